"""Heart disease in four hospitals: penalties by group of columns, and each hospital's say in training.

x: penalty (4,), a log penalty for each group of columns (the patient, at rest, under exercise,
imaging), and hospital (4,), a logit for each hospital. y: logistic regression, weight (21,) and
bias (): 17 measured columns, and an indicator of each hospital, whose weight is what its intercept
differs from the common one. A row of hospital i has the weight 4 softmax(hospital)_i, so the mean of
the hospitals' weights is one whatever x is.

    inner:  weighted cross-entropy on the training rows, plus
            sum_k exp(penalty_k) |weights of group k|^2 / 2, and fixed penalties: `OWN` on the
            hospitals' intercepts, a small one on the common one
    outer:  cross-entropy on the validation rows, unweighted

f and g are plain means over the hospitals: each hospital's patients are as important as any
other's, though there are 303, 294, 123 and 200 of them, and 46, 36, 93 and 75 % are ill. Hospitals
measure unlike one another, and `hospital` says whose rows help all. The outer loss does not contain
x: the hypergradient has no direct part. The start is x = 0.

Rows are the hospitals' own: `partition`, `alpha` and `clients` have nothing to decide. Each hospital
imputes and standardises by its own training rows, since no row leaves it and the library has no
exchange that would standardise by the sums of all (`fedbilevel.datasets.heart`). A quarter of its
rows is for the test, 30 % of the rest validates.

Metrics: test_accuracy and test_loss over the test rows of all, validation_loss (f).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..arrays import held
from ..data import FederatedData
from ..datasets import Dataset, load
from ..datasets.heart import GROUPS, HOSPITALS
from ..errors import check
from ..problem import Problem
from . import logistic
from .base import Kind, Options, Row, Task, classification_metrics, suited, validation_loss
from .network import Layer

VALIDATION, OWN = 0.3, 0.1
SIZES = (*(len(group) for group in GROUPS), len(HOSPITALS))

Upper = Mapping[str, Array]  # "penalty" (4,) and "hospital" (4,)


def predict(x: Upper, y: Layer, a: Float[Array, "rows features"]) -> Float[Array, "rows classes"]:
    """Logits of a (rows, features)."""
    return logistic.logits(y, a)


def outer_loss(x: Upper, y: Layer, example: Row) -> Float[Array, ""]:
    """Cross-entropy of one example."""
    return logistic.cross_entropy(logistic.logit(y, example["a"]), example["label"])


def inner_loss(x: Upper, y: Layer, example: Row) -> Float[Array, ""]:
    """Cross-entropy of one example times its hospital's weight, plus the penalties."""
    count = x["hospital"].shape[0]
    own = jnp.arange(count) == example["hospital"]
    weight = count * jnp.sum(jnp.where(own, jax.nn.softmax(x["hospital"]), 0))
    penalty = jnp.append(x["penalty"], jnp.asarray(np.log(OWN), x["penalty"].dtype))
    return weight * outer_loss(x, y, example) + logistic.penalty(penalty, y, SIZES)


def build(options: Options) -> Task:
    check(
        options.partition == "iid" and options.alpha is None and options.clients in (None, len(HOSPITALS)),
        f"the hearts task has {len(HOSPITALS)} hospitals with their own rows: leave --partition, --alpha and --clients out.",
    )
    name = str(options.dataset)
    dataset = with_hospitals(load(name, options.data_dir))
    data = FederatedData.split(_clients(dataset), VALIDATION, options.keys()[1], names=list(HOSPITALS))
    x = {"penalty": held(np.zeros(len(GROUPS))), "hospital": held(np.zeros(len(HOSPITALS)))}
    metrics = classification_metrics(predict, dataset) | {"validation_loss": validation_loss(outer_loss, data)}
    y = logistic.first(sum(SIZES))
    return Task("hearts", name, Problem(inner_loss, outer_loss), data, x, y, metrics, options.keys()[3])


def with_hospitals(dataset: Dataset) -> Dataset:
    """The data set with an indicator of each site behind its columns."""
    one = np.eye(len(HOSPITALS), dtype=np.float32)
    wide = lambda a, sites: np.concatenate([a, one[sites]], axis=1)
    return dataclasses.replace(
        dataset,
        x_train=wide(dataset.x_train, dataset.sites_train),
        x_test=wide(dataset.x_test, dataset.sites_test),
    )


def _clients(dataset: Dataset) -> list[dict[str, np.ndarray]]:
    sites = np.asarray(dataset.sites_train)
    every = {"a": dataset.x_train, "label": dataset.y_train, "hospital": sites}
    return [{part: values[sites == i] for part, values in every.items()} for i in range(len(HOSPITALS))]


hearts = Kind(
    "hearts",
    "x: log penalties by group of columns and a weight for each of four hospitals, y: logistic regression",
    suited(lambda facts: facts.kind == "silos"),
    build,
)
