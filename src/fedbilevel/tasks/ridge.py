"""Ridge tuning: one penalty per feature for least squares. A closed form exists for y*(x) and the hypergradient.

x: log penalties (features,); y: weights (features, targets) and bias. Inner: half the squared error on training rows plus
sum_j exp(x_j) |weight_j|^2 / 2 (and a small fixed penalty on the bias); outer: half the squared error on validation rows.
On a classification data set the targets are the one-hot labels, centred.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..arrays import held, on_device
from ..datasets import Dataset
from ..problem import Problem
from .base import Kind, Options, Row, Task, classification_metrics, federated, suited
from .closed_form import closed_form_metrics
from .network import Layer

BIAS_PENALTY = 0.01
_SMALL = 100  # lower variables up to which the closed-form metrics are quick enough to take while running


def predict(x: Float[Array, " features"], y: Layer, a: Float[Array, "rows features"]) -> Float[Array, "rows targets"]:
    """Predictions (rows, targets) of a (rows, features)."""
    return a @ y["weight"] + y["bias"][None]


def outer_loss(x: Float[Array, " features"], y: Layer, example: Row) -> Float[Array, ""]:
    """Half the squared error of one example."""
    return 0.5 * jnp.sum((example["a"] @ y["weight"] + y["bias"] - example["target"]) ** 2)


def inner_loss(x: Float[Array, " features"], y: Layer, example: Row) -> Float[Array, ""]:
    """Half the squared error of one example plus the penalties."""
    penalty = jnp.sum(jnp.exp(x)[:, None] * y["weight"] ** 2) + BIAS_PENALTY * jnp.sum(y["bias"] ** 2)
    return outer_loss(x, y, example) + 0.5 * penalty


def targets(dataset: Dataset, labels: np.ndarray) -> np.ndarray:
    """(rows, targets): centred one-hot labels, or the numbers themselves."""
    if dataset.classes is None:
        return np.asarray(labels, np.float32)[:, None]
    return np.eye(dataset.classes, dtype=np.float32)[labels] - np.float32(1 / dataset.classes)


def build(options: Options) -> Task:
    name = str(options.dataset)
    columns = lambda d, rows: {"a": d.x_train[rows], "target": targets(d, d.y_train[rows])}
    dataset, data = federated(options, columns, outer=0.3)
    features, outputs = dataset.x_train.shape[1], dataset.classes or 1
    x = held(np.zeros(features))
    y = {"weight": held(np.zeros((features, outputs))), "bias": held(np.zeros(outputs))}
    problem = Problem(inner_loss, outer_loss)
    if dataset.classes is None:
        rows = {"a": on_device(dataset.x_test), "target": on_device(targets(dataset, dataset.y_test))}
        error = jax.jit(lambda x, y: 2 * jnp.mean(jax.vmap(lambda row: outer_loss(x, y, row))(rows)))
        metrics = {"test_error": error}
    else:
        metrics = classification_metrics(predict, dataset)
    if features * outputs <= _SMALL:
        metrics |= closed_form_metrics(problem, data)
    return Task("ridge", name, problem, data, x, y, metrics, options.keys()[3])


ridge = Kind(
    "ridge",
    "x: log penalties of least squares, y: its weights; a closed form exists",
    suited(lambda facts: facts.kind in ("images", "numbers")),
    build,
)
