"""Cleaning in the dense form: a weight for each training row, in one array that all clients have, whose mean is one.

The task `cleaning` was this when the figures were taken. Its rows and wrong labels are those of the task today, where each
client has its own weights. Row j of n has the weight n sigmoid(x_j) / sum_k sigmoid(x_k); each entry of the hypergradient is
of the order of 1/n, so good upper steps are large.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax.tree

import fedbilevel as fb
from fedbilevel.arrays import entry, held
from fedbilevel.datasets import load
from fedbilevel.tasks.base import Kind, Options, Task, classification_metrics, validation_loss
from fedbilevel.tasks.cleaning import dealt, outer_loss, predict

PENALTY = 0.01


class InnerLoss(eqx.Module):
    """Weighted cross-entropy of one example, plus penalty/2 |y|^2; `number` is its place in x."""

    penalty: float = eqx.field(static=True, default=PENALTY)

    def __call__(self, x, y, example):
        shares = jax.nn.sigmoid(x)
        weight = entry(shares, example["number"]) / jnp.mean(shares)
        return weight * outer_loss(x, y, example) + 0.5 * self.penalty * optax.tree.norm(y, squared=True)


def build(options: Options) -> Task:
    name = str(options.dataset)
    dataset = load(name, options.data_dir)
    a, classes, rows = dataset.x_train, int(dataset.classes or 0), dealt(options, dataset)
    count = sum(len(own) for own in rows.inner)
    numbers = np.split(np.arange(count, dtype=np.int32), np.cumsum([len(own) for own in rows.inner])[:-1])
    data = fb.FederatedData.stack(
        [
            {"a": a[own], "label": labels, "number": number}
            for own, labels, number in zip(rows.inner, rows.labels, numbers, strict=True)
        ],
        [{"a": a[own], "label": dataset.y_train[own]} for own in rows.outer],
    )
    y = {"weight": held(np.zeros((a.shape[1], classes))), "bias": held(np.zeros(classes))}
    metrics = classification_metrics(predict, dataset) | {"validation_loss": validation_loss(outer_loss, data)}
    problem = fb.Problem(InnerLoss(), outer_loss)
    return Task("cleaning", name, problem, data, held(np.zeros(count)), y, metrics, options.keys()[3])


dense_cleaning = Kind("cleaning", "x: one array of weights", ("digits",), build)
