"""Hyper-representation: learn the body of a network so that a head trained on top of it does well on validation rows.

x is the body (one hidden layer, ReLU), y the head. Inner: cross-entropy on a client's training rows plus penalty/2 |y|^2;
outer: cross-entropy on its validation rows. Half of a client's rows validate when the partition is iid, a fifth else
(as in the public code of FedNest, whose MNIST network is 784-200-10).
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp

from ..problem import Problem
from .base import Kind, Options, Task, classification_metrics, cross_entropy, federated

HIDDEN = {"digits": 64, "mnist": 200, "fashion-mnist": 200}
CLIENTS = {"digits": 20, "mnist": 100, "fashion-mnist": 100}


def body(x, example):
    """The hidden layer of one example: inputs (inputs,) -> (hidden,). It does not depend on y."""
    return jax.nn.relu(example["a"] @ x["weight"] + x["bias"])


def predict(x, y, a):
    """Logits of a (rows, inputs)."""
    hidden = jax.nn.relu(a @ x["weight"] + x["bias"][None])
    return hidden @ y["weight"] + y["bias"][None]


def head_loss(y, hidden, label):
    """Cross-entropy of the head on one example's hidden layer."""
    return cross_entropy(hidden @ y["weight"] + y["bias"], label)


def outer_loss(x, y, example):
    """Cross-entropy of one example."""
    return head_loss(y, body(x, example), example["label"])


class InnerLoss(eqx.Module):
    """Cross-entropy of one example, plus penalty/2 |y|^2, on the body's features."""

    penalty: float = eqx.field(static=True, default=0.01)

    def __call__(self, x, y, example, hidden):
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))
        return head_loss(y, hidden, example["label"]) + 0.5 * self.penalty * squares


def build(options: Options) -> Task:
    name = str(options.dataset)
    dataset, data = federated(
        options,
        lambda d, rows: {"a": d.x_train[rows], "label": d.y_train[rows]},
        CLIENTS[name],
        outer=0.5 if options.partition == "iid" else 0.2,
    )
    start, run = options.keys()[2:]
    inputs, hidden, classes = dataset.x_train.shape[1], HIDDEN[name], int(dataset.classes or 0)
    lower_layer, head = jax.random.split(start)
    return Task(
        "hyper-representation", name, Problem(InnerLoss(), outer_loss, features=body), data,
        _layer(lower_layer, inputs, hidden), _layer(head, hidden, classes),
        classification_metrics(predict, dataset), run,
    )  # fmt: skip


def _layer(key, inputs: int, outputs: int):
    """A dense layer, entries uniform in +-1/sqrt(inputs)."""
    bound = inputs**-0.5
    weight, bias = jax.random.split(key)
    return {
        "weight": jax.random.uniform(weight, (inputs, outputs), minval=-bound, maxval=bound),
        "bias": jax.random.uniform(bias, (outputs,), minval=-bound, maxval=bound),
    }


hyper_representation = Kind(
    "hyper-representation",
    "x: a network's body, y: its head; validation rows judge the body",
    tuple(HIDDEN),
    build,
)
