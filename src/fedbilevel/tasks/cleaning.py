"""Data cleaning: a weight for each training row, its client's own, when two in five labels are wrong.

x: a logit for each training row, a ragged block of its client (`fb.per_client`): row j of client i has
the weight 2 sigmoid(x_ij), between nothing and twice. y: multinomial logistic regression.

    inner:  2 sigmoid(x_ij) times the cross-entropy of training row j of client i, plus PENALTY/2 |y|^2
    outer:  cross-entropy on the validation rows

A tenth of each client's rows is held for the outer level, and their labels are right. Of the other
rows the share `WRONG`, drawn over all clients, has the label of another class, each as likely. Of
larger data sets `ROWS` rows are taken, drawn by the seed. The start is x = 0: all weights are one. The
outer loss does not contain x: the hypergradient has no direct part.

Weights are bounded one by one and not divided by their sum: that of all rows nobody knows, for a
client sees its own block alone, and that of a client's would say that no client is worse than others.

A row is flagged where its weight is below half of the median of all weights. A client that was never
asked has its block still at the start; its rows say nothing, and are left out of found and flagged.

Metrics: test_accuracy, test_loss, validation_loss (f); found, the share of pairs of a right and a wrong
row in which the wrong one has the smaller weight (the area under the ROC curve; a half at the start);
flagged, the F1 score of the flags (zero at the start); and never_asked, how many rows are left out.
The accuracy is that of y as it stands, at a penalty that is good for finding wrong rows: for a model, train
again with the weights found (`fb.train`) at a smaller one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
import optax.tree
from jaxtyping import Array, Float, PyTree

from ..arrays import entry, held, on_device
from ..data import FederatedData
from ..datasets import Dataset, load
from ..keys import generator
from ..metrics import Metric
from ..owned import PerClient, per_client
from ..partition import Parts
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

CLEAN, WRONG, PENALTY = 0.1, 0.4, 0.1
ROWS = 10_000  # of a data set that has more


class Dealt(NamedTuple):
    """Of each client: its rows' numbers in the data set, at both levels; labels of training rows, and which are wrong."""

    inner: Parts
    outer: Parts
    labels: list[np.ndarray]
    wrong: list[np.ndarray]


def predict(x: PyTree, y: Layer, a: Float[Array, "rows features"]) -> Float[Array, "rows classes"]:
    """Logits of a (rows, features)."""
    return a @ y["weight"] + y["bias"][None]


def outer_loss(x: PyTree, y: Layer, example: Row) -> Float[Array, ""]:
    """Cross-entropy of one example."""
    return cross_entropy(example["a"] @ y["weight"] + y["bias"], example["label"])


class InnerLoss(eqx.Module):
    """Weighted cross-entropy of one example, plus the penalty; an array, so that others compile nothing again.

    Attributes:
        l2: () the penalty of |y|^2 / 2.
    """

    l2: Float[Array, ""]

    def __call__(self, x: Float[Array, " training"], y: Layer, example: Row) -> Float[Array, ""]:
        """`place` is where the row's logit is in its client's block."""
        loss = weight(entry(x, example["place"])) * outer_loss(x, y, example)
        return loss + 0.5 * self.l2.astype(loss.dtype) * optax.tree.norm(y, squared=True)


def weight(x: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """What a row counts for: between zero and two."""
    return 2 * jax.nn.sigmoid(x)


def build(options: Options) -> Task:
    name = str(options.dataset)
    dataset = load(name, options.data_dir)
    rows = dealt(options, dataset)
    a, classes = dataset.x_train, int(dataset.classes or 0)
    data = FederatedData.stack(
        [
            {"a": a[own], "label": labels, "place": np.arange(len(own), dtype=np.int32)}
            for own, labels in zip(rows.inner, rows.labels, strict=True)
        ],
        [{"a": a[own], "label": dataset.y_train[own]} for own in rows.outer],
    )
    x = per_client([np.zeros(len(own), held(0.0).dtype) for own in rows.inner])
    y = {"weight": held(np.zeros((a.shape[1], classes))), "bias": held(np.zeros(classes))}
    metrics = classification_metrics(predict, dataset)
    metrics |= {"validation_loss": validation_loss(outer_loss, data), **judged(rows.wrong)}
    return Task("cleaning", name, Problem(InnerLoss(held(PENALTY)), outer_loss), data, x, y, metrics, options.keys()[3])


def dealt(options: Options, dataset: Dataset) -> Dealt:
    """The rows of all clients: at most `ROWS` in all, a tenth of each client's held, and `WRONG` of the others wrong."""
    place, division, _, _ = options.keys()
    labels = dataset.y_train
    taken = np.arange(len(labels))
    if len(labels) > ROWS:
        taken = np.sort(generator(fold_in(place, 0)).permutation(len(labels))[:ROWS])
    parts = deal(options, labels[taken], dataset.facts.clients)
    inner, outer = ([taken[own] for own in level] for level in levels(labels[taken], parts, division, CLEAN))
    rng = generator(fold_in(division, 0))
    said, wrong = replaced(labels[np.concatenate(inner)], int(dataset.classes or 0), rng)
    ends = np.cumsum([len(own) for own in inner])[:-1]
    return Dealt(inner, outer, np.split(said, ends), np.split(wrong, ends))


def replaced(labels: np.ndarray, classes: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The labels, the share `WRONG` of them (to the nearest row) of another class; and which, (rows,) bool."""
    wrong = np.zeros(len(labels), bool)
    wrong[rng.permutation(len(labels))[: round(WRONG * len(labels))]] = True
    other = (labels + rng.integers(1, classes, size=len(labels))) % classes
    return np.where(wrong, other, labels).astype(labels.dtype), wrong


def judged(wrong: list[np.ndarray]) -> dict[str, Metric]:
    """found, flagged and never_asked, of the blocks of x; `wrong` says of each client's rows which are, (rows,) bool."""
    truth = np.concatenate(wrong)

    def of(score: Callable[[np.ndarray, np.ndarray], float]) -> Metric:
        def metric(x: PerClient, y: PyTree) -> float:
            known = asked(x)
            return score(np.concatenate(x.blocks)[known], truth[known])

        return metric

    return {
        "found": of(area),
        "flagged": of(lambda x, truth: f1(flags(x), truth)),
        "never_asked": lambda x, y: float(np.sum(~asked(x))),
    }


def asked(x: PerClient) -> np.ndarray:
    """(rows,) bool, client after client: whether its client was ever asked, and has moved its block."""
    return np.concatenate([np.full(len(block), np.any(np.asarray(block) != 0)) for block in x.blocks])


def flags(x: np.ndarray) -> np.ndarray:
    """(rows,) bool: which weights are below half of their median."""
    own = np.asarray(weight(on_device(x)))
    return own < np.median(own) / 2 if len(own) else np.zeros(0, bool)


def f1(said: np.ndarray, wrong: np.ndarray) -> float:
    """The harmonic mean of the share of the flagged rows that are wrong, and of the wrong rows that are flagged."""
    return 2 * float(np.sum(said & wrong)) / max(int(np.sum(said)) + int(np.sum(wrong)), 1)


def area(x: np.ndarray, wrong: np.ndarray) -> float:
    """The share of pairs of a right and a wrong row in which the wrong one has the smaller x; ties count a half."""
    right = np.sort(x[~wrong])
    if len(right) in (0, len(x)):
        return 0.5
    above, level = (len(right) - np.searchsorted(right, x[wrong], side) for side in ("right", "left"))
    return float(np.mean(above + level)) / 2 / len(right)


cleaning = Kind(
    "cleaning",
    "x: a weight for each training row, its client's own block, y: logistic regression; 40 % of the labels are wrong",
    suited(lambda facts: facts.kind == "images"),
    build,
    algorithm="lockstep",
)
