"""Personal heads: a body that all clients train together, and a head of its own for each.

y: body, one hidden layer of `WIDTH` units with ReLU, and head, a block of its client (`fb.per_client`).
x: body (), the log penalty of the body, and head (clients,), that of each client's own head, its block.

    inner:  cross-entropy of a client's own head on the training rows, plus
            exp(x_body)/2 |body|^2 + exp(x_head of the client)/2 |its head|^2
    outer:  cross-entropy on the validation rows, 30 % of a client's

The body is narrow, with fewer units than classes: one common head has to tell all classes apart by
them, a client's own those that it has. All heads begin alike. The outer loss does not contain x: the
hypergradient has no direct part. Clients differ by what labels they have if the partition is "shards",
"dirichlet" too; where it is "iid" there is nothing to be personal about.

A client is judged by its own labels: its accuracy is the mean over them, in the proportions of its own
rows (both levels), of the share that its head tells right of ALL test rows of that label. It is what
test rows dealt in these proportions would say on average, and no draw.

Metrics: test_accuracy, the mean of this over clients; worst_accuracy, that of the worst one; test_loss,
the mean over clients of the loss, weighed alike; validation_loss (f).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..arrays import held, on_device
from ..data import FederatedData
from ..datasets import Dataset, load
from ..metrics import Metric
from ..owned import per_client, unmarked
from ..partition import Parts
from ..problem import Problem
from ..threefry import split_key
from .base import Kind, Options, Row, Task, cross_entropy, deal, suited, validation_loss
from .loss_tuning import levels
from .network import Layer, hidden, layer, logits

VALIDATION, WIDTH = 0.3, 6
BODY, HEAD = 0.001, 0.01  # the penalties at the start

Penalties = Mapping[str, Array]  # "body" () and "head", a block of a client, ()
Network = Mapping[str, Layer]  # "body", and "head", a client's own


def outer_loss(x: Penalties, y: Network, example: Row) -> Float[Array, ""]:
    """Cross-entropy of one example by the head of its client."""
    return cross_entropy(logits(y["body"], y["head"], example["a"]), example["label"])


def inner_loss(x: Penalties, y: Network, example: Row) -> Float[Array, ""]:
    """The same, plus the penalties."""
    size = lambda own: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(own))
    return outer_loss(x, y, example) + 0.5 * sum(jnp.exp(x[part]) * size(y[part]) for part in ("body", "head"))


def build(options: Options, width: int = WIDTH) -> Task:
    """The task, with so many units in the body."""
    name = str(options.dataset)
    _, division, start, run = options.keys()
    dataset = load(name, options.data_dir)
    parts = deal(options, dataset.y_train, dataset.facts.clients)
    rows = lambda own: [{"a": dataset.x_train[k], "label": dataset.y_train[k]} for k in own]
    inner, outer = levels(dataset.y_train, parts, division, VALIDATION)
    data = FederatedData.stack(rows(inner), rows(outer))
    inputs, classes = dataset.x_train.shape[1], int(dataset.classes or 0)
    body, head = split_key(start, 2)
    each = lambda leaf: per_client(on_device(np.tile(leaf, (len(parts), *[1] * np.ndim(leaf)))))
    x = {"body": held(np.log(BODY)), "head": each(held(np.log(HEAD)))}
    y = {"body": layer(body, inputs, width), "head": jax.tree.map(each, layer(head, width, classes))}
    metrics = own_accuracies(dataset, shares(dataset.y_train, parts, classes))
    metrics |= {"validation_loss": validation_loss(outer_loss, data)}
    return Task("personal", name, Problem(inner_loss, outer_loss), data, x, y, metrics, run)


def shares(labels: np.ndarray, parts: Parts, classes: int) -> np.ndarray:
    """(clients, classes) the share of each class in a client's rows."""
    counts = np.stack([np.bincount(labels[rows], minlength=classes) for rows in parts])
    return counts / counts.sum(axis=1, keepdims=True)


def own_accuracies(dataset: Dataset, share: np.ndarray) -> dict[str, Metric]:
    """test_accuracy, worst_accuracy and test_loss, each client by its own head and labels.

    Args:
        share: (clients, classes) the share of each class in a client's rows.
    """
    a, labels = on_device(dataset.x_test), on_device(dataset.y_test)
    counts = np.bincount(dataset.y_test, minlength=share.shape[1])
    weights = held((share / np.maximum(counts, 1))[:, dataset.y_test])  # (clients, test rows), each row adding to one
    told = lambda y: _told(y["body"], unmarked(y["head"]), a, labels, weights)
    return {
        "test_accuracy": lambda x, y: told(y)[0].mean(),
        "worst_accuracy": lambda x, y: told(y)[0].min(),
        "test_loss": lambda x, y: told(y)[1].mean(),
    }


@jax.jit
def _told(
    body: Layer,
    heads: Layer,
    a: Float[Array, "rows inputs"],
    labels: Int[Array, " rows"],
    weights: Float[Array, "clients rows"],
) -> tuple[Float[Array, " clients"], Float[Array, " clients"]]:
    """Each client's weighted share of the rows that its head tells right, and its weighted loss."""
    phi = jax.vmap(lambda row: hidden(body, row))(a)

    def one(given: tuple[Layer, Float[Array, " rows"]]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        head, weight = given
        said = phi @ head["weight"] + head["bias"][None]
        right, losses = jnp.argmax(said, axis=1) == labels, jax.vmap(cross_entropy)(said, labels)
        return jnp.sum(jnp.where(right, weight, 0)), jnp.sum(weight.astype(losses.dtype) * losses)

    return jax.lax.map(one, (heads, weights))


personal = Kind(
    "personal",
    "x: log penalties of a body and of every client's own head, y: the body, and these heads, blocks of their clients",
    suited(lambda facts: facts.hidden is not None),
    build,
    partition="shards",
    algorithm="lockstep",
)
