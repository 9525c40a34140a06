"""Hyper-representation: learn the body of a network so that a head trained on top of it does well on validation rows.

x is the body, y the head. The body is one hidden layer with ReLU, or with model="cnn" two convolutions with group
normalisation. Inner: cross-entropy on a client's training rows plus penalty/2 |y|^2; outer: cross-entropy on its validation
rows. Half of a client's rows validate when the partition is iid, a fifth else (as in the public code of FedNest, whose MNIST
network is 784-200-10).
"""

from __future__ import annotations

import equinox as eqx
import jax
import optax.tree
from jaxtyping import Array, Float, PyTree

from ..problem import Problem
from ..threefry import split_key
from .base import Kind, Options, Row, Task, classification_metrics, cross_entropy, federated, suited
from .network import MODELS, Body, Layer, convolutions, hidden, layer, logits


def predict(x: Body, y: Layer, a: Float[Array, "rows inputs"]) -> Float[Array, "rows classes"]:
    """Logits of a (rows, inputs)."""
    return jax.vmap(lambda row: logits(x, y, row))(a)


def outer_loss(x: Body, y: Layer, example: Row) -> Float[Array, ""]:
    """Cross-entropy of one example."""
    return cross_entropy(logits(x, y, example["a"]), example["label"])


def features(x: Body, example: Row) -> Float[Array, " hidden"]:
    """What the body makes of one example, which does not depend on y."""
    return hidden(x, example["a"])


class InnerLoss(eqx.Module):
    """Cross-entropy of the head on the hidden layer of one example, plus penalty/2 |y|^2."""

    penalty: float = eqx.field(static=True, default=0.01)

    def __call__(self, x: PyTree, y: Layer, example: Row, phi: Float[Array, " hidden"]) -> Float[Array, ""]:
        loss = cross_entropy(phi @ y["weight"] + y["bias"], example["label"])
        return loss + 0.5 * self.penalty * optax.tree.norm(y, squared=True)


def build(options: Options) -> Task:
    name = str(options.dataset)
    dataset, data = federated(
        options,
        lambda d, rows: {"a": d.x_train[rows], "label": d.y_train[rows]},
        outer=0.5 if options.partition == "iid" else 0.2,
    )
    start, run = options.keys()[2:]
    inputs, width, classes = dataset.x_train.shape[1], int(dataset.facts.hidden or 0), int(dataset.classes or 0)
    body, head = split_key(start, 2)
    x, width = convolutions(body, inputs) if options.model == "cnn" else (layer(body, inputs, width), width)
    return Task(
        "hyper-representation", name, Problem(InnerLoss(), outer_loss, features=features), data, x,
        layer(head, width, classes), classification_metrics(predict, dataset), run,
    )  # fmt: skip


hyper_representation = Kind(
    "hyper-representation",
    "x: a network's body, y: its head; validation rows judge the body",
    suited(lambda facts: facts.hidden is not None),
    build,
    models=MODELS,
)
