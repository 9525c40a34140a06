"""Banks that look for rare failures: three penalties and a class weight. The rows are synthetic.

x: penalty (3,), a log penalty for each group of five columns, and class_weight (), a logit.
y: logistic regression, weight (15,) and bias (). With s = sigmoid(class_weight) the share of the
loss that positives get, and p their share of the training rows,

    inner:  cross-entropy on the training rows, a positive with weight s / p, a negative with
            (1 - s) / (1 - p), plus sum_k exp(penalty_k) |weights of group k|^2 / 2 (and a small
            fixed penalty on the bias)
    outer:  cross-entropy on the validation rows, a row of class c with weight n / (2 n_c)

The weights' mean is one whatever x is: class_weight weighs classes against each other, and never the
loss against the penalties. Banks count in proportion to their rows at both levels, so g is a mean
over all training rows, and f the mean of the two classes' own mean cross-entropies. (With such
weights Lockstep and FedF2SA ask everybody, and refuse a cohort.) The outer loss does not contain x:
the hypergradient has no direct part. The start is s = p (all rows alike) and penalties of one; s = 1/2
would be the usual weights by hand, one over the frequency.

Five banks have 51 to 411 rows, of which 40 % validate; another number of banks is spread over the
same range. 6 % of all rows are positive. Banks differ in where their columns lie, in how often they
see a positive, and a little in what makes one. Five columns tell much, five little, and five
nothing. The test rows are drawn alike, `TEST` times as many from each bank.

Metrics: test_loss and balanced_accuracy (both give the two classes the same say), validation_loss (f).
"""

from __future__ import annotations

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..arrays import held
from ..data import FederatedData
from ..datasets import Dataset
from ..keys import generator
from ..metrics import Metric
from ..problem import Problem
from . import logistic
from .base import Kind, Options, Row, Task, balanced_accuracy, class_weights, mean_loss, validation_loss
from .closed_form import check_own_clients
from .loss_tuning import levels
from .network import Layer

ROWS = (51, 96, 184, 308, 411)  # of each bank, at both levels together
POSITIVES, VALIDATION, TEST = 0.06, 0.4, 3
GROUPS = (5, 5, 5)  # columns
EFFECTS = (0.8, 0.2, 0.0)  # of a column of each group on the logit, up to its sign
SHIFT, OWN, BASE = 0.5, 0.1, 0.5  # how banks differ: where columns lie, effects, log odds of a positive

Upper = Mapping[str, Array]  # "penalty" (3,) and "class_weight" ()


def predict(x: Upper, y: Layer, a: Float[Array, "rows inputs"]) -> Float[Array, "rows classes"]:
    """Logits of a (rows, inputs)."""
    return logistic.logits(y, a)


def outer_loss(x: Upper, y: Layer, example: Row) -> Float[Array, ""]:
    """Cross-entropy of one example times its weight."""
    loss = logistic.cross_entropy(logistic.logit(y, example["a"]), example["label"])
    return example["weight"].astype(loss.dtype) * loss


class InnerLoss(eqx.Module):
    """Cross-entropy of one example times its class's weight, plus the penalties.

    Attributes:
        positives: p, the share of the training rows that are positive.
    """

    positives: float = eqx.field(static=True)

    def __call__(self, x: Upper, y: Layer, example: Row) -> Float[Array, ""]:
        loss = logistic.cross_entropy(logistic.logit(y, example["a"]), example["label"])
        share = jax.nn.sigmoid(x["class_weight"])
        weight = jnp.where(example["label"] == 1, share / self.positives, (1 - share) / (1 - self.positives))
        return weight * loss + logistic.penalty(x["penalty"], y, GROUPS)


def build(options: Options) -> Task:
    check_own_clients("bank", options)
    place, division, _, run = options.keys()
    banks, test = draw(generator(place), options.clients or len(ROWS))
    a, labels = (np.concatenate(part) for part in zip(*banks, strict=True))
    ends = np.cumsum([len(own) for _, own in banks])
    parts = np.split(np.arange(len(labels)), ends[:-1])
    inner, outer = levels(labels, parts, division, VALIDATION)
    weights = np.zeros(len(labels))
    weights[np.concatenate(outer)] = class_weights(labels[np.concatenate(outer)])
    data = FederatedData.stack(
        [{"a": a[rows], "label": labels[rows]} for rows in inner],
        [{"a": a[rows], "label": labels[rows], "weight": weights[rows]} for rows in outer],
        weights="rows",
        names=[f"bank {i}" for i in range(len(banks))],
    )
    positives = float(labels[np.concatenate(inner)].mean())
    x = {"penalty": held(np.zeros(len(GROUPS))), "class_weight": held(np.log(positives / (1 - positives)))}
    metrics = _metrics(a, labels, *test) | {"validation_loss": validation_loss(outer_loss, data)}
    return Task(
        "bank", "synthetic", Problem(InnerLoss(positives), outer_loss), data, x, logistic.first(sum(GROUPS)), metrics, run
    )  # fmt: skip


def _metrics(a: np.ndarray, labels: np.ndarray, a_test: np.ndarray, labels_test: np.ndarray) -> dict[str, Metric]:
    rows = {"a": held(a_test), "label": held(labels_test, np.int32), "weight": held(class_weights(labels_test))}
    dataset = Dataset("bank", a, labels, a_test, labels_test, 2)
    return {"test_loss": mean_loss(outer_loss, rows), "balanced_accuracy": balanced_accuracy(predict, dataset)}


Table = tuple[np.ndarray, np.ndarray]  # columns (rows, 15), labels (rows,) int32


def draw(rng: np.random.Generator, banks: int) -> tuple[list[Table], Table]:
    """The banks' rows, and those of the test, which are pooled."""
    effects = np.repeat(EFFECTS, GROUPS) * rng.choice([-1, 1], size=sum(GROUPS))
    places, kinds = np.linspace(0, 1, banks), np.linspace(0, 1, len(ROWS))
    counts = np.interp(places, kinds, ROWS).round().astype(int)
    columns, scores = [], []
    for count in counts:
        rows = (1 + TEST) * count
        normal = rng.normal(size=(rows, sum(GROUPS)))
        own = effects + OWN * rng.normal(size=sum(GROUPS))
        columns.append((normal + SHIFT * rng.normal(size=sum(GROUPS))).astype(np.float32))
        scores.append(normal @ own + BASE * rng.normal() + rng.logistic(size=rows))
    tables = [([c[:n] for c, n in zip(part, counts, strict=True)]) for part in (columns, scores)]
    tests = [np.concatenate([c[n:] for c, n in zip(part, counts, strict=True)]) for part in (columns, scores)]
    labels = np.split(_highest(np.concatenate(tables[1])), np.cumsum(counts)[:-1])
    return list(zip(tables[0], labels, strict=True)), (tests[0], _highest(tests[1]))


def _highest(scores: np.ndarray) -> np.ndarray:
    """(rows,) int32: 1 for the share `POSITIVES` of the rows with the highest scores, and at least two."""
    most = max(round(POSITIVES * len(scores)), 2)
    labels = np.zeros(len(scores), np.int32)
    labels[np.argsort(scores)[-most:]] = 1
    return labels


bank = Kind(
    "bank",
    "x: three log penalties and a class weight, y: logistic regression; 6 % positives in five unequal banks",
    ("synthetic",),
    build,
)
