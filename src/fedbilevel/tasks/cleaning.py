"""Data cleaning: a weight for each training row, when two in five labels are wrong.

x (training rows of all clients,): a logit for each row; y: multinomial logistic regression. Training
row j of n has the weight w_j = n sigmoid(x_j) / sum_k sigmoid(x_k), whose mean is one whatever x is:
weights weigh rows against each other, and never the loss against the penalty.

    inner:  w_j times the cross-entropy of training row j, plus PENALTY/2 |y|^2
    outer:  cross-entropy on the validation rows

A tenth of each client's rows is held for the outer level, and their labels are right. Of the other
rows the share `WRONG`, drawn over all clients, has the label of another class, each as likely. The
outer loss does not contain x: the hypergradient has no direct part. Each of its entries is of the
order of 1/n, so good upper steps are large. The start is x = 0: all rows alike.

Metrics: test_accuracy, test_loss, validation_loss (f), and found: the share of pairs of a right and a
wrong row in which the wrong one has the smaller weight (the area under the ROC curve; a half at the
start).
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax.tree
from jaxtyping import Array, Bool, Float, PyTree

from ..arrays import entry, held, on_device
from ..data import FederatedData
from ..datasets import load
from ..keys import generator
from ..metrics import Metric
from ..problem import Problem
from ..threefry import fold_in
from .base import (
    Kind,
    Options,
    Row,
    Task,
    classification_metrics,
    cross_entropy,
    deal,
    suited,
    validation_loss,
)
from .loss_tuning import levels
from .network import Layer

CLEAN, WRONG, PENALTY = 0.1, 0.4, 0.01


def predict(x: PyTree, y: Layer, a: Float[Array, "rows features"]) -> Float[Array, "rows classes"]:
    """Logits of a (rows, features)."""
    return a @ y["weight"] + y["bias"][None]


def outer_loss(x: PyTree, y: Layer, example: Row) -> Float[Array, ""]:
    """Cross-entropy of one example."""
    return cross_entropy(example["a"] @ y["weight"] + y["bias"], example["label"])


class InnerLoss(eqx.Module):
    """Weighted cross-entropy of one example, plus penalty/2 |y|^2; `number` is its place in x."""

    penalty: float = eqx.field(static=True, default=PENALTY)

    def __call__(self, x: Float[Array, " training"], y: Layer, example: Row) -> Float[Array, ""]:
        shares = jax.nn.sigmoid(x)
        weight = entry(shares, example["number"]) / jnp.mean(shares)
        return weight * outer_loss(x, y, example) + 0.5 * self.penalty * optax.tree.norm(y, squared=True)


def build(options: Options) -> Task:
    name = str(options.dataset)
    dataset = load(name, options.data_dir)
    division, run = options.keys()[1], options.keys()[3]
    parts = deal(options, dataset.y_train, dataset.facts.clients)
    inner, outer = levels(dataset.y_train, parts, division, CLEAN)
    a, classes = dataset.x_train, int(dataset.classes or 0)
    rows = np.concatenate(inner)  # in the order of x
    labels, wrong = replaced(dataset.y_train[rows], classes, generator(fold_in(division, 0)))
    ends = np.cumsum([len(own) for own in inner])[:-1]
    data = FederatedData.stack(
        [
            {"a": a[rows[own]], "label": labels[own], "number": own.astype(np.int32)}
            for own in np.split(np.arange(len(rows)), ends)
        ],
        [{"a": a[own], "label": dataset.y_train[own]} for own in outer],
    )
    y = {"weight": held(np.zeros((a.shape[1], classes))), "bias": held(np.zeros(classes))}
    metrics = classification_metrics(predict, dataset)
    metrics |= {"validation_loss": validation_loss(outer_loss, data), "found": found(wrong)}
    return Task("cleaning", name, Problem(InnerLoss(), outer_loss), data, held(np.zeros(len(rows))), y, metrics, run)


def replaced(labels: np.ndarray, classes: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The labels, the share `WRONG` of them (to the nearest row) of another class; and which, (rows,) bool."""
    wrong = np.zeros(len(labels), bool)
    wrong[rng.permutation(len(labels))[: round(WRONG * len(labels))]] = True
    other = (labels + rng.integers(1, classes, size=len(labels))) % classes
    return np.where(wrong, other, labels).astype(labels.dtype), wrong


def found(wrong: np.ndarray) -> Metric:
    """How well x tells wrong rows: the share of pairs in which the wrong row has the smaller x.

    Ties count a half. `wrong` is (rows,) bool.
    """
    flags = on_device(wrong)
    return lambda x, y: _area(x, flags)


@jax.jit
def _area(x: Float[Array, " training"], wrong: Bool[Array, " training"]) -> Float[Array, ""]:
    order = jnp.sort(jnp.where(wrong, jnp.inf, x))  # those of the right rows, ascending
    right = jnp.sum(~wrong)
    above = right - jnp.searchsorted(order, x, side="right")
    level = jnp.searchsorted(order, x, side="right") - jnp.searchsorted(order, x, side="left")
    score = (above + 0.5 * level.astype(x.dtype)) / right.astype(x.dtype)
    return jnp.sum(jnp.where(wrong, score, 0)) / jnp.sum(wrong).astype(x.dtype)


cleaning = Kind(
    "cleaning",
    "x: a weight for each training row, y: logistic regression; 40 % of the training labels are wrong",
    suited(lambda facts: facts.kind == "images"),
    build,
)
