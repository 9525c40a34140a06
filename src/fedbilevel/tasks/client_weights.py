"""Client weights: how much each client counts in training, when a third of them have wrong labels.

x: a logit for each client, a block of its client (`fb.per_client`): its rows have the weight
2 sigmoid(x_i), between nothing and twice. y: multinomial logistic regression.

    inner:  2 sigmoid(x_i) times the cross-entropy on the training rows of client i, plus PENALTY/2 |y|^2
    outer:  cross-entropy on the validation rows

A tenth of each client's rows is held for the outer level, and their labels are right: the few that
somebody has looked at. Of a third of the clients, drawn by the seed, EVERY training label is replaced
by another class, each as likely. The start is x = 0: all weights are one, as in plain federated
training. The outer loss does not contain x: the hypergradient has no direct part.

Why blocks, and no array of which each client looks up its number: a client is sent one number
whatever the number of clients, does not see what others are thought to be worth, and a step acts on
its own gradient. And the weights then cannot be divided by their sum, which would move every client's
weight with each: the good ones would be played off against each other, and that they are worth the
same would be left to chance. Bounded ones cannot run away, and end near twice or near nothing.

Metrics: test_accuracy, test_loss, validation_loss (f), and weight_ratio: the largest weight of a bad
client over the smallest of a good one (one at the start).
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax.tree
from jaxtyping import Array, Float

from ..arrays import held, on_device
from ..data import FederatedData
from ..datasets import load
from ..keys import generator
from ..metrics import Metric
from ..owned import per_client
from ..problem import Problem
from ..threefry import fold_in
from .base import (
    Kind,
    Options,
    Row,
    Task,
    classification_metrics,
    deal,
    suited,
    validation_loss,
)
from .cleaning import outer_loss, predict
from .loss_tuning import levels
from .network import Layer

CLEAN, PENALTY = 0.1, 0.01


class InnerLoss(eqx.Module):
    """Cross-entropy of one example times the weight of its client, plus penalty/2 |y|^2."""

    penalty: float = eqx.field(static=True, default=PENALTY)

    def __call__(self, x: Float[Array, ""], y: Layer, example: Row) -> Float[Array, ""]:
        return weight(x) * outer_loss(x, y, example) + 0.5 * self.penalty * optax.tree.norm(y, squared=True)


def weight(x: Float[Array, "*clients"]) -> Float[Array, "*clients"]:
    """What a client counts for: between zero and two."""
    return 2 * jax.nn.sigmoid(x)


def build(options: Options) -> Task:
    name = str(options.dataset)
    _, division, _, run = options.keys()
    dataset = load(name, options.data_dir)
    parts = deal(options, dataset.y_train, dataset.facts.clients)
    inner, outer = levels(dataset.y_train, parts, division, CLEAN)
    a, classes = dataset.x_train, int(dataset.classes or 0)
    bad = wrong_clients(options, len(parts))
    rng = generator(fold_in(division, 1))
    training = [
        {"a": a[rows], "label": another(dataset.y_train[rows], classes, rng) if wrong else dataset.y_train[rows]}
        for rows, wrong in zip(inner, bad, strict=True)
    ]
    data = FederatedData.stack(training, [{"a": a[rows], "label": dataset.y_train[rows]} for rows in outer])
    y = {"weight": held(np.zeros((a.shape[1], classes))), "bias": held(np.zeros(classes))}
    metrics = classification_metrics(predict, dataset)
    metrics |= {"validation_loss": validation_loss(outer_loss, data), "weight_ratio": weight_ratio(bad)}
    x = per_client(held(np.zeros(len(parts))))
    return Task("client-weights", name, Problem(InnerLoss(), outer_loss), data, x, y, metrics, run)


def wrong_clients(options: Options, clients: int) -> np.ndarray:
    """(clients,) bool: those whose labels are wrong, a third (to the nearest), drawn by the options' seed."""
    rng = generator(fold_in(options.keys()[1], 0))
    bad = np.zeros(clients, bool)
    bad[rng.permutation(clients)[: round(clients / 3)]] = True
    return bad


def another(labels: np.ndarray, classes: int, rng: np.random.Generator) -> np.ndarray:
    """For each label another class, each as likely."""
    return ((labels + rng.integers(1, classes, size=len(labels))) % classes).astype(labels.dtype)


def weight_ratio(bad: np.ndarray) -> Metric:
    """The largest weight of a bad client over the smallest of a good one. `bad` is (clients,) bool, of both kinds some."""
    flags = on_device(bad)

    def ratio(x: Float[Array, " clients"]) -> Float[Array, ""]:
        each = weight(x)
        return jnp.max(jnp.where(flags, each, 0)) / jnp.min(jnp.where(flags, jnp.inf, each))

    compiled = jax.jit(ratio)
    return lambda x, y: compiled(x.value)


client_weights = Kind(
    "client-weights",
    "x: a weight for each client, its block, y: logistic regression; a third of the clients have wrong labels",
    suited(lambda facts: facts.kind == "images"),
    build,
    algorithm="lockstep",
)
