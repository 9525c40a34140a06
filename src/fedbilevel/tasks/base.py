"""A task: a problem with its data, a start, and metrics, ready for `solve`."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from .. import cache, owned
from ..algorithm import Algorithm
from ..arrays import held, on_device
from ..by_client import ClientMetrics, Share
from ..callbacks.base import Callback
from ..data import FederatedData
from ..datasets import DATASETS, Dataset, Facts, load
from ..description import Description
from ..engines.base import Engine
from ..errors import check, unknown_name
from ..given import Whole
from ..metrics import Metric
from ..partition import Parts, partition
from ..problem import Loss, Problem
from ..threefry import new_key, split_key

DataDir = str | os.PathLike[str] | None
Row = Mapping[str, Array]  # one row of a client's, its parts by name
Labels = Int[Array, " rows"]
Predict = Callable[[PyTree, PyTree, Float[Array, "rows inputs"]], Float[Array, "rows classes"]]


class How(TypedDict, total=False):
    """How a task is run, by the names of `Description`."""

    iterations: Whole | None
    rounds: Whole | None
    engine: Engine | None
    evaluate_every: Whole
    keep: str | None
    callbacks: Sequence[Callback] | Callable[[], Sequence[Callback]]
    check: bool
    precision: int | None
    name: str


@dataclasses.dataclass(frozen=True)
class Task:
    """What `fb.solve` needs: `fb.solve(t.problem, t.data, algorithm, t.x, t.y, metrics=t.metrics, ...)`.

    Attributes:
        name, dataset: what it is called, and which data it stands on.
        problem, data, x, y: the problem, the clients' data, and the start.
        metrics: name -> fn(x, y) -> scalar.
        key: the run's key, derived from the seed.
        client_metrics, share_metrics: how each client fares, and what of it travels, as `fb.solve` takes them.
    """

    name: str
    dataset: str
    problem: Problem
    data: FederatedData
    x: PyTree
    y: PyTree
    metrics: Mapping[str, Metric]
    key: Key[Array, ""]
    client_metrics: ClientMetrics = dataclasses.field(default_factory=dict)
    share_metrics: Share = "mean"

    def describe(self, algorithm: Algorithm, **how: Unpack[How]) -> Description:
        """A run on it, described: `task.describe(algorithm, rounds=300).run()`.

        Args:
            how: what `Description` takes beside problem, data, start, key and metrics: iterations or rounds, engine,
                evaluate_every, keep, callbacks, check, precision, name.
        """
        return Description(
            problem=self.problem, algorithm=algorithm, data=self.data, start=(self.x, self.y), key=self.key,
            metrics=self.metrics, client_metrics=self.client_metrics, share_metrics=self.share_metrics,
            **{"name": self.name, **how},
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """How to build a task.

    Attributes:
        dataset: name of the data set; None for the task's default.
        data_dir: folder of data sets that are not embedded (MNIST, Fashion-MNIST, heart disease).
        partition: "iid", "shards", "dirichlet" or "quantity".
        clients: how many; None for the task's default.
        alpha: concentration of "dirichlet" and "quantity"; None for their default.
        seed: decides the partition, the start and the run's randomness.
        model: which of the networks that a task has; None for the first.
    """

    dataset: str | None = None
    data_dir: DataDir = None
    partition: str = "iid"
    clients: int | None = None
    alpha: float | None = None
    seed: int = 0
    model: str | None = None

    def keys(self) -> list[Key[Array, ""]]:
        """Keys for the partition, the split, the start and the run."""
        cache.begin()  # a task's first program
        return split_key(new_key(self.seed), 4)


class Settings(TypedDict, total=False):
    """The options by name, as a task takes them without `Options`."""

    dataset: str | None
    data_dir: DataDir
    partition: str
    clients: int | None
    alpha: float | None
    seed: int
    model: str | None


@dataclasses.dataclass(frozen=True)
class Kind:
    """A task as the command line knows it.

    Attributes:
        name, summary: its name, and a line about it.
        datasets: the data sets it runs on, the default first.
        build: Options -> Task.
        partition: how rows are dealt unless one says.
        algorithm: what the command line runs unless one says: "lockstep" where AggITD does worse by much.
        models: the networks it knows, the default first; none where there is nothing to choose.
    """

    name: str
    summary: str
    datasets: tuple[str, ...]
    build: Callable[[Options], Task]
    partition: str = "iid"
    algorithm: str = "aggitd"
    models: tuple[str, ...] = ()

    def __call__(self, options: Options | None = None, **settings: Unpack[Settings]) -> Task:
        """Build the task: `kind(dataset="digits", clients=20, seed=0)`."""
        names = [f.name for f in dataclasses.fields(Options)]
        for name in settings:
            if name not in names:
                raise unknown_name(f"option of the task {self.name}", name, names)
        options = options or Options(**{"partition": self.partition, **settings})
        dataset = self.datasets[0] if options.dataset is None else options.dataset
        if dataset not in self.datasets:
            raise unknown_name(f"data set for {self.name}", dataset, self.datasets)
        model = options.model
        check(
            model is None or self.models,
            f"the task {self.name} has no models to choose from: leave model= (--model) out.",
        )
        if model is not None and model not in self.models:
            raise unknown_name(f"model for {self.name}", model, self.models)
        clients = options.clients
        good = clients is None or (isinstance(clients, int) and clients >= 1)
        check(good, f"clients= is how many clients there are, a whole number of at least 1; got {clients!r}.")
        return self.build(dataclasses.replace(options, dataset=dataset))


def federated(
    options: Options, columns: Callable[[Dataset, np.ndarray], PyTree], outer: float
) -> tuple[Dataset, FederatedData]:
    """Load a data set, partition its training rows, and split each client's for the two levels.

    Args:
        columns: (data set, row indices) -> one client's rows.
        outer: the share of a client's rows for the outer level.
    """
    dataset = load(str(options.dataset), options.data_dir)
    parts = deal(options, dataset.y_train, dataset.facts.clients)
    return dataset, FederatedData.split([columns(dataset, rows) for rows in parts], outer, options.keys()[1])


def suited(judge: Callable[[Facts], bool]) -> tuple[str, ...]:
    """The data sets of which `judge` holds, by name, in the order in which they ship."""
    return tuple(name for name, source in DATASETS.items() if judge(source.facts))


def deal(options: Options, labels: np.ndarray, clients: int) -> Parts:
    """The options' partition of the rows that `labels` belong to, among `clients` unless the options say."""
    extra = {} if options.alpha is None else {"alpha": options.alpha}
    return partition(options.partition, labels, options.clients or clients, options.keys()[0], **extra)


def class_weights(labels: np.ndarray) -> np.ndarray:
    """(rows,) n / (C n_c) for a row of class c: n_c of the n rows are of that class, and C classes occur.

    Their mean is one, and the mean of weight times value is the mean over the C classes of the class's own mean.
    """
    _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return len(labels) / (len(counts) * counts[place])


def validation_loss(outer_loss: Loss, data: FederatedData) -> Metric:
    """The outer objective f(x, y) over all clients' validation rows, each weighted as the library's means weigh it.

    One pass over the flat rows: quick enough to take while running, where `reference.outer_value` pads clients.
    """
    counts = data.count("outer")
    p = np.full(data.clients, 1 / data.clients) if data.weights is None else np.asarray(data.weights)
    weights = held(np.repeat(p * np.asarray(data.outer.scale) / counts, counts))
    whose = on_device(np.repeat(np.arange(data.clients, dtype=np.int32), counts))
    return lambda x, y: _weighted_loss(outer_loss, x, y, data.outer.rows, weights, whose)


def mean_loss(loss: Loss, rows: PyTree) -> Metric:
    """The mean of a loss over rows that are a pytree of arrays, rows first: of test rows, say."""
    count = len(jax.tree.leaves(rows)[0])
    weights = held(np.full(count, 1 / count))
    return lambda x, y: _weighted_loss(loss, x, y, rows, weights)


@functools.partial(jax.jit, static_argnums=0)
def _weighted_loss(
    loss: Loss,
    x: PyTree,
    y: PyTree,
    rows: PyTree,
    weights: Float[Array, " rows"],
    whose: Int[Array, " rows"] | None = None,
) -> Float[Array, ""]:
    """The weighted sum of a loss over rows; `whose` says whose blocks each sees, where x or y has any."""
    if whose is None:
        losses = jax.vmap(lambda row: loss(x, y, row))(rows)
    else:
        seen = lambda client: owned.bare(owned.own((x, y), client))
        losses = jax.vmap(lambda row, client: loss(*seen(client), row))(rows, whose)
    return jnp.sum(weights.astype(losses.dtype) * losses)


def cross_entropy(logits: Float[Array, " classes"], label: Int[Array, ""]) -> Float[Array, ""]:
    """-log softmax(logits)[label] of one example: logits (classes,), label () int."""
    own = (
        jnp.arange(logits.shape[0]) == label
    )  # not an index: its derivative would be a scatter, a slow loop over the rows
    return jax.nn.logsumexp(logits) - jnp.sum(jnp.where(own, logits, 0))


def classification_metrics(predict: Predict, dataset: Dataset) -> dict[str, Metric]:
    """test_accuracy in [0, 1] and test_loss of predict(x, y, features) -> logits (rows, classes)."""
    features, labels = on_device(dataset.x_test), on_device(dataset.y_test)

    def accuracy(x: PyTree, y: PyTree) -> Float[Array, ""]:
        return _score(predict, x, y, features, labels)[0]

    def loss(x: PyTree, y: PyTree) -> Float[Array, ""]:
        return _score(predict, x, y, features, labels)[1]

    return {"test_accuracy": accuracy, "test_loss": loss}


def balanced_accuracy(predict: Predict, dataset: Dataset) -> Metric:
    """The mean over the classes of the test rows of the share of each that predict(x, y, features) gets right."""
    features, labels = on_device(dataset.x_test), on_device(dataset.y_test)
    weights = held(class_weights(dataset.y_test))
    return lambda x, y: _weighted_accuracy(predict, x, y, features, labels, weights)


def _scores(
    predict: Predict, x: PyTree, y: PyTree, features: Float[Array, "rows inputs"], labels: Labels
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The share of the rows that are told right, and the mean loss."""
    logits = predict(x, y, features)
    losses = jax.vmap(cross_entropy)(logits, labels)
    return jnp.mean((jnp.argmax(logits, axis=1) == labels).astype(logits.dtype)), jnp.mean(losses)


_score = jax.jit(_scores, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _weighted_accuracy(
    predict: Predict,
    x: PyTree,
    y: PyTree,
    features: Float[Array, "rows inputs"],
    labels: Labels,
    weights: Float[Array, " rows"],
) -> Float[Array, ""]:
    return jnp.mean(jnp.where(jnp.argmax(predict(x, y, features), axis=1) == labels, weights, 0))
