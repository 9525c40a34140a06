"""Loss tuning: adjust the training loss to imbalanced classes, so that all classes do equally well on validation rows.

y: all weights of a network (one hidden layer, ReLU). x: delta and iota, a factor and a shift for the logits of each class.

    inner:  cross-entropy of  sigmoid(delta) * logits + iota  on the training rows, plus PENALTY/2 |y|^2
    outer:  cross-entropy of the plain logits on the validation rows, a row of class c with weight n / (C n_c)

n_c of the n validation rows of ALL clients are of class c. The weights are not normalised again, and each client i of m
scales its own by m n_i / n, so that in the plain mean over clients all count in proportion to their rows: f = (1/C) sum_c
(mean cross-entropy of class c), however the classes lie, and a cohort's plain mean is an unbiased estimate of it. A client
that divided by the sum of its own weights would undo them where it holds one class only. g is the plain mean over clients
of their means over training rows. The outer loss does not contain x: the hypergradient has no direct part. The start is
delta = iota = 0: all classes alike.

Metrics: test_accuracy, test_loss, balanced_accuracy (mean over classes of the recall on the test rows), validation_loss (f).

Of class c floor(n_max * r^(c / (C - 1))) + 1 training rows are kept, at most all (`fb.partition.imbalanced`), with r
the data set's `rarest`; the test rows stay as they are. After the loss tuning of FedNest (Tarzanagh et al., ICML 2022),
whose loss is the parametric one of AutoBalance (Li et al., NeurIPS 2021). The penalty is ours: g stays non-convex in y,
as with any such network, but y stays bounded, and directions that the data leave flat get a curvature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import equinox as eqx
import jax
import numpy as np
import optax.tree
from jaxtyping import Array, Float, Key

from ..arrays import held
from ..data import FederatedData
from ..datasets import load
from ..errors import check
from ..keys import generator
from ..partition import Parts, imbalanced
from ..problem import Problem
from ..threefry import fold_in, split_key
from .base import (
    Kind,
    Options,
    Row,
    Task,
    balanced_accuracy,
    class_weights,
    classification_metrics,
    cross_entropy,
    deal,
    suited,
    validation_loss,
)
from .network import Layer, layer, logits

VALIDATION = 0.2  # of a client's rows, whatever the partition
PENALTY = 0.001

Network = Mapping[str, Layer]  # "body" and "head"
Shifts = Mapping[str, Float[Array, " classes"]]  # "delta" and "iota"


def predict(x: Shifts, y: Network, a: Float[Array, "rows inputs"]) -> Float[Array, "rows classes"]:
    """Plain logits of a (rows, inputs)."""
    return jax.vmap(lambda row: logits(y["body"], y["head"], row))(a)


def outer_loss(x: Shifts, y: Network, example: Row) -> Float[Array, ""]:
    """Cross-entropy of one example times its weight."""
    loss = cross_entropy(logits(y["body"], y["head"], example["a"]), example["label"])
    return example["weight"].astype(loss.dtype) * loss


class InnerLoss(eqx.Module):
    """Cross-entropy of one example with adjusted logits, plus penalty/2 |y|^2."""

    penalty: float = eqx.field(static=True, default=PENALTY)

    def __call__(self, x: Shifts, y: Network, example: Row) -> Float[Array, ""]:
        adjusted = jax.nn.sigmoid(x["delta"]) * logits(y["body"], y["head"], example["a"]) + x["iota"]
        return cross_entropy(adjusted, example["label"]) + 0.5 * self.penalty * optax.tree.norm(y, squared=True)


def build(options: Options) -> Task:
    name = str(options.dataset)
    place, split, start, run = options.keys()
    whole = load(name, options.data_dir)
    facts = whole.facts
    kept = imbalanced(whole.y_train, facts.rarest, fold_in(place, 0), facts.most)
    dataset = dataclasses.replace(whole, x_train=whole.x_train[kept], y_train=whole.y_train[kept])
    parts = deal(options, dataset.y_train, facts.clients)
    data = clients_data(dataset.x_train, dataset.y_train, *levels(dataset.y_train, parts, split))
    inputs, width, classes = dataset.x_train.shape[1], int(facts.hidden or 0), int(dataset.classes or 0)
    body, head = split_key(start, 2)
    x = {"delta": held(np.zeros(classes)), "iota": held(np.zeros(classes))}
    y = {"body": layer(body, inputs, width), "head": layer(head, width, classes)}
    test = classification_metrics(predict, dataset)
    metrics = {
        "test_accuracy": test["test_accuracy"],
        "balanced_accuracy": balanced_accuracy(predict, dataset),
        "test_loss": test["test_loss"],
        "validation_loss": validation_loss(outer_loss, data),
    }
    return Task("loss-tuning", name, Problem(InnerLoss(), outer_loss), data, x, y, metrics, run)


def clients_data(a: np.ndarray, labels: np.ndarray, inner: Parts, outer: Parts) -> FederatedData:
    """The clients' rows at both levels, the outer ones with weights that make clients count in proportion to their rows."""
    weights = np.zeros(len(labels), jax.dtypes.canonicalize_dtype(float))
    held = np.concatenate(outer)
    weights[held] = class_weights(labels[held])
    for rows in outer:
        weights[rows] *= len(outer) * len(rows) / len(held)
    return FederatedData.stack(
        [{"a": a[rows], "label": labels[rows]} for rows in inner],
        [{"a": a[rows], "label": labels[rows], "weight": weights[rows]} for rows in outer],
    )


def levels(labels: np.ndarray, parts: Parts, key: Key[Array, ""], share: float = VALIDATION) -> tuple[Parts, Parts]:
    """Split each client's rows at random into training and validation rows, with every class among the latter.

    Args:
        share: of a client's rows for validation, to the nearest row.

    Raises:
        InputError: a client with fewer than two rows, or a class for which nobody has a row to spare.
    """
    sizes = np.array([len(rows) for rows in parts])
    short = int(sizes.argmin())
    check(sizes[short] > 1, f"client {short} has {sizes[short]} row, and needs one for each level: use fewer clients.")
    rng, spare = generator(key), sizes - 1
    owner, chosen = np.empty(len(labels), np.int64), np.zeros(len(labels), bool)
    for client, rows in enumerate(parts):
        owner[rows] = client
    for label in np.unique(labels):  # one validation row of each class first: a rare one could be missed
        rows = rng.permutation(np.flatnonzero(labels == label))
        free = rows[spare[owner[rows]] > 0]
        check(len(free), f"no client can spare a validation row of class {label}: use fewer clients.")
        chosen[free[0]] = True
        spare[owner[free[0]]] -= 1
    inner, outer = [], []
    for rows in parts:
        order = rng.permutation(rows)
        order = order[np.argsort(~chosen[order], kind="stable")]
        held = min(max(round(share * len(rows)), int(chosen[rows].sum()), 1), len(rows) - 1)
        outer.append(order[:held])
        inner.append(order[held:])
    return inner, outer


loss_tuning = Kind(
    "loss-tuning",
    "x: a factor and a shift for each class's logits, y: a network; imbalanced classes, no direct part",
    suited(lambda facts: facts.hidden is not None),
    build,
)
