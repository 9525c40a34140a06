"""Regularisation tuning: one penalty per feature for multinomial logistic regression.

x: log penalties (features,); y: weights and bias. Inner: cross-entropy on training rows plus
sum_j exp(x_j) |weight_j|^2 / 2 (and a small fixed penalty on the bias); outer: cross-entropy on validation rows. The outer
loss does not contain x: the hypergradient has no direct part.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..arrays import held
from ..problem import Problem
from .base import Kind, Options, Row, Task, classification_metrics, cross_entropy, federated, suited, validation_loss
from .network import Layer

BIAS_PENALTY = 0.01


def predict(x: Float[Array, " features"], y: Layer, a: Float[Array, "rows features"]) -> Float[Array, "rows classes"]:
    """Logits of a (rows, features)."""
    return a @ y["weight"] + y["bias"][None]


def outer_loss(x: Float[Array, " features"], y: Layer, example: Row) -> Float[Array, ""]:
    """Cross-entropy of one example."""
    return cross_entropy(example["a"] @ y["weight"] + y["bias"], example["label"])


def inner_loss(x: Float[Array, " features"], y: Layer, example: Row) -> Float[Array, ""]:
    """Cross-entropy of one example plus the penalties."""
    penalty = jnp.sum(jnp.exp(x)[:, None] * y["weight"] ** 2) + BIAS_PENALTY * jnp.sum(y["bias"] ** 2)
    return outer_loss(x, y, example) + 0.5 * penalty


def build(options: Options) -> Task:
    name = str(options.dataset)
    columns = lambda d, rows: {"a": d.x_train[rows], "label": d.y_train[rows]}
    dataset, data = federated(options, columns, outer=0.3)
    features, classes = dataset.x_train.shape[1], int(dataset.classes or 0)
    x = held(np.zeros(features))
    y = {"weight": held(np.zeros((features, classes))), "bias": held(np.zeros(classes))}
    metrics = classification_metrics(predict, dataset) | {"validation_loss": validation_loss(outer_loss, data)}
    return Task("regularisation", name, Problem(inner_loss, outer_loss), data, x, y, metrics, options.keys()[3])


regularisation = Kind(
    "regularisation",
    "x: log penalties of logistic regression, y: its weights; no direct part in the hypergradient",
    suited(lambda facts: facts.kind in ("images", "classes")),
    build,
)
