"""Where a compiled program comes for what torch computes: the losses and the rows, by a number.

A program knows a problem by a number alone, which is an argument of it: other rows, or losses that compute the same, run
what is compiled already. One call answers for all clients of an exchange, one after the other, each on its own rows
without padding. On processors that is as fast as one call over padded rows (`torch.vmap`), or faster where there are
convolutions, and keeps what rows a loss sees out of the question.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Array, Int, PyTree

from ..arrays import Structure
from ..beside import Served, alone
from ..compiled import Kept
from ..data import FederatedData, Level
from ..errors import InputError, RunError, check
from ..jaxprs import Tracer
from ..problem import Rows
from .derivatives import WAYS, At, Leaves, Loss, Way, gradient, product, value
from .digest import digest
from .look import depends, look, way_of, work
from .tensors import as_rows, kept_rows, numbers, rows_of, tensor_of

Name: TypeAlias = Literal[
    "inner_value",
    "outer_value",
    "inner_gradient",
    "inner_gradient_x",
    "outer_gradients",
    "hessian_vector",
    "cross_vector",
]
_ORACLES: dict[str, Callable[..., list[torch.Tensor]]] = {
    "inner_value": lambda at, v, way: value(at),
    "outer_value": lambda at, v, way: value(at),
    "inner_gradient": lambda at, v, way: gradient(at, "y"),
    "inner_gradient_x": lambda at, v, way: gradient(at, "x"),
    "outer_gradients": lambda at, v, way: gradient(at, "xy"),
    "hessian_vector": lambda at, v, way: product(at, v, "y", way),
    "cross_vector": lambda at, v, way: product(at, v, "x", way),
}
_SECOND = ("hessian_vector", "cross_vector")
LITTLE = 2.0**24  # operations of a batch, up to which several threads take longer to meet than they save
_FEW = 4  # rows that losses are looked at on
_LOOKS: Kept[Known] = Kept(64)
_LIVE: weakref.WeakValueDictionary[int, Host] = weakref.WeakValueDictionary()
_METRICS: weakref.WeakValueDictionary[str, Metric] = weakref.WeakValueDictionary()
_count = itertools.count(1)


class Numbers(eqx.Module):
    """Stands for rows of a problem that is bound to them: their numbers, those of the outer level after the inner ones."""

    number: Int[Array, " rows"]


@dataclasses.dataclass(frozen=True)
class Asked:
    """An oracle, as a compiled program calls it.

    Attributes:
        name: of the oracle.
        says: the digest of what the losses compute; "" where it was not asked.
        x, y: the structures of the variables.
        metric: the digest of a metric that is asked for in place of the outer loss; "": none is.
        rows: that of the rows, alone in a tuple; () where their numbers are given. Not None: JAX's caches compare
            parameters of programs of like hashes, and jaxlib 0.10 cannot compare a structure with None.
    """

    name: Name
    says: str
    x: Structure
    y: Structure
    rows: tuple[Structure, ...]
    metric: str = ""

    def __call__(self, batch: tuple[int, ...], number: np.ndarray, *args: np.ndarray) -> list[np.ndarray]:
        return _LIVE[int(number.reshape(-1)[0])].answer(self, batch, args)


@dataclasses.dataclass(frozen=True)
class Stored:
    """The rows of a level.

    Attributes:
        first: the number of the first row.
        leaves, structure: all clients', rows first.
    """

    first: int
    leaves: list[torch.Tensor]
    structure: Structure

    @classmethod
    def of(cls, level: Level, first: int) -> Stored:
        """The rows of a level, in the memory where they lie."""
        leaves, structure = jax.tree.flatten(level.rows)
        return cls(first, [kept_rows(np.asarray(leaf)) for leaf in leaves], structure)

    def batch(self, rows: np.ndarray) -> PyTree:
        """Some rows, by their numbers, as a loss takes them: where they lie side by side, without a copy."""
        begin = int(rows[0]) - self.first
        if len(rows) == 1 or (rows[1:] - rows[:-1] == 1).all():
            return self.structure.unflatten([as_rows(leaf[begin : begin + len(rows)]) for leaf in self.leaves])
        place = torch.from_numpy(rows.astype(np.int64) - self.first)
        return self.structure.unflatten([as_rows(leaf.index_select(0, place)) for leaf in self.leaves])


@dataclasses.dataclass(frozen=True)
class Known:
    """What a look at the losses has shown.

    Attributes:
        way: how second derivatives of the inner loss are taken.
        without: why it has none, in torch's words; "" where it has.
        work: floating-point operations of the losses for a row.
        depends: of each leaf of a variable, whether a loss depends on it, by (level, variable).
    """

    way: Way = WAYS[0]
    without: str = ""
    work: float = 0.0
    depends: dict[tuple[str, str], list[bool]] = dataclasses.field(default_factory=dict)


class Metric:
    """A number of a metric of a batch, as a program comes for it: known by what it computes.

    Args:
        function: (x, y, batch, weights) -> a number, or a pair.
        place: of the number in the pair; None: it is no pair.
    """

    def __init__(self, function: Loss, place: int | None):
        self.function, self.place = function, place
        self.says = f"{digest(function, function)} {place}"
        _METRICS[self.says] = self

    def __call__(self, x: PyTree, y: PyTree, batch: PyTree, weights: torch.Tensor) -> torch.Tensor:
        found = self.function(x, y, batch, weights)
        return torch.as_tensor(found if self.place is None else found[self.place]).to(weights.dtype)


class Host:
    """The losses of a problem, and the rows that it is bound to.

    Attributes:
        number: by which programs know it, for as long as somebody holds it.
        known: what a look at the losses has shown.
        says: a digest of what they compute, and how they are differentiated; "" before they were looked at.
        failure: what a loss raised within a compiled program.
        served: the program that runs, where a thread serves it.
    """

    def __init__(
        self, inner: Loss, outer: Loss, levels: Sequence[Stored] = (), known: Known | None = None, says: str = ""
    ):
        self.inner, self.outer, self.known, self.says = inner, outer, known or Known(), says
        self.failure: Exception | None = None
        self.served: Served | None = None
        self._levels = levels
        self.number = next(_count)
        _LIVE[self.number] = self

    def bound(self, data: FederatedData) -> Host:
        """The same losses, bound to rows."""
        inside = Stored.of(data.inner, 0)
        return Host(
            self.inner, self.outer, [inside, Stored.of(data.outer, len(inside.leaves[0]))], self.known, self.says
        )

    def looked_at(self, x: PyTree, y: PyTree, data: FederatedData) -> Host:
        """The same, of which it is known what the losses compute now.

        Raises:
            InputError: they cannot mean what they say (`look`).
        """
        says = digest(self.inner, self.outer)
        leaves, structure = jax.tree.flatten((x, y, data.inner.rows, data.outer.rows))
        if not all(isinstance(leaf, (np.ndarray, jax.Array)) and not isinstance(leaf, Tracer) for leaf in leaves):
            return Host(self.inner, self.outer, self._levels, self.known, says)
        shapes = tuple((leaf.shape[1:], str(leaf.dtype)) for leaf in leaves)
        rows = [self._few(level) for level in (data.inner, data.outer)]
        kinds = tuple((tuple(leaf.shape), str(leaf.dtype)) for leaf in jax.tree.leaves(rows))
        known = _LOOKS.get((says, structure, shapes, kinds), lambda: self._look(x, y, *rows))
        return Host(self.inner, self.outer, self._levels, known, f"{says} {known.way}")

    def _look(self, x: PyTree, y: PyTree, inner: PyTree, outer: PyTree) -> Known:
        (x, like_x), (y, like_y) = jax.tree.flatten(x), jax.tree.flatten(y)
        x, y = ([tensor_of(np.array(leaf)) for leaf in leaves] for leaves in (x, y))
        found: dict[tuple[str, str], list[bool]] = {}
        ats = []
        for level, loss, rows in (("inner", self.inner, inner), ("outer", self.outer, outer)):
            count = len(jax.tree.leaves(rows)[0])
            weights = torch.arange(1, count + 1, dtype=y[0].dtype)
            ats.append(At(loss, like_x, like_y, x, y, rows, weights / weights.sum()))
            look(level, ats[-1])
            found[level, "x"], found[level, "y"] = depends(level, ats[-1])
        return Known(*way_of(ats[0]), max(map(work, ats)), found)

    def tried(self, function: Loss, x: PyTree, y: PyTree, data: FederatedData) -> Any:
        """What a metric returns for some rows."""
        x, y = (jax.tree.map(lambda leaf: tensor_of(np.array(leaf)), tree) for tree in (x, y))
        rows = self._few(data.outer)
        count, kind = len(jax.tree.leaves(rows)[0]), jax.tree.leaves(y)[0].dtype
        return function(x, y, rows, torch.full((count,), 1 / count, dtype=kind))

    def _few(self, level: Level) -> PyTree:
        """Some rows of the first client, in memory of their own."""
        begin, count = int(level.offsets[0]), int(level.counts[0])
        some = slice(begin, begin + min(count, _FEW))
        leaves, structure = jax.tree.flatten(level.rows)
        if isinstance(level.rows, Numbers):
            first = np.asarray(level.rows.number)[some]
            return jax.tree.map(lambda leaf: leaf.clone(), self._stored(first).batch(first))
        return structure.unflatten([rows_of(np.array(np.asarray(leaf)[some])) for leaf in leaves])

    def _stored(self, rows: np.ndarray) -> Stored:
        """The level of which rows are, by their numbers."""
        return next(level for level in reversed(self._levels) if level.first <= rows[0])

    def products(self, x: PyTree, y: PyTree, v: PyTree, rows: Rows) -> dict[str, PyTree]:
        """d2_yy g v in each way that exists, on rows that are given, outside of any program."""
        (xs, like_x), (ys, like_y) = jax.tree.flatten(x), jax.tree.flatten(y)
        xs, ys, vs = ([tensor_of(np.array(leaf)) for leaf in leaves] for leaves in (xs, ys, jax.tree.leaves(v)))
        count = int(rows.count)
        batch = jax.tree.map(lambda leaf: rows_of(np.array(leaf)[:count]), rows.examples)
        weights = tensor_of(np.array(rows.weights)[:count]).to(ys[0].dtype)
        found = {}
        for way in WAYS:
            with contextlib.suppress(Exception):  # that there is none is what `check_second` tells
                product_of = product(At(self.inner, like_x, like_y, xs, ys, batch, weights), vs, "y", way)
                found[way] = like_y.unflatten([jnp.asarray(numbers(leaf)) for leaf in product_of])
        return found

    def check_second(self, name: Name) -> None:
        """Refuse a product with second derivatives that do not exist.

        Raises:
            InputError: with the operation that has none, in torch's words.
        """
        check(
            name not in _SECOND or not self.known.without,
            f"the inner loss has no second derivatives in torch {torch.__version__}, neither by double backward nor by "
            f"forward over reverse ({self.known.without}): use another operation, or an algorithm that needs first "
            "derivatives only, such as MemFBO or FedF2SA, with numbers for its step sizes.",
        )

    def answer(self, asked: Asked, batch: tuple[int, ...], args: Sequence[np.ndarray]) -> list[np.ndarray]:
        """What an oracle says, of each: arrays with `batch` as their first axes.

        Args:
            args: leaves of x, y, perhaps v, and rows, the rows' weights and how many are no padding; each with as many
                axes first as `batch` has, of its lengths or of 1.
        """
        if self.known.work * args[-2].shape[-1] < LITTLE:
            return alone(_in_one_thread, self._answer, asked, batch, args)
        return (alone if self.served is None else self.served.ask)(self._answer, asked, batch, args)

    def _answer(self, asked: Asked, batch: tuple[int, ...], args: Sequence[np.ndarray]) -> list[np.ndarray]:
        try:
            variables = asked.x.num_leaves + asked.y.num_leaves * (2 if asked.name in _SECOND else 1)
            tensors = [_lanes(tensor_of(_flat(arg, batch)).unbind(), arg, batch) for arg in args[:variables]]
            *rows, weights, count = [_lanes(_flat(arg, batch), arg, batch) for arg in args[variables:]]
            found = [
                self._one(asked, [leaf[k] for leaf in tensors], [leaf[k] for leaf in rows], weights[k], int(count[k]))
                for k in range(math.prod(batch))
            ]
            return [numbers(torch.stack(leaf)).reshape((*batch, *leaf[0].shape)) for leaf in zip(*found, strict=True)]
        except Exception as error:  # whatever the user's loss raises; XLA would tell it as a text of its own
            self.failure = error
            raise

    def _one(
        self, asked: Asked, variables: Leaves, rows: Sequence[np.ndarray], weights: np.ndarray, count: int
    ) -> list[torch.Tensor]:
        """What an oracle says of one client."""
        first, second = asked.x.num_leaves, asked.x.num_leaves + asked.y.num_leaves
        x, y, v = variables[:first], variables[first:second], variables[second:]
        if not asked.rows:
            chosen = rows[0][:count]
            batch = self._stored(chosen).batch(chosen)
        else:
            batch = asked.rows[0].unflatten([rows_of(leaf[:count]) for leaf in rows])
        loss = self.outer if asked.name.startswith("outer") else self.inner
        loss = _METRICS[asked.metric] if asked.metric else loss
        at = At(loss, asked.x, asked.y, x, y, batch, tensor_of(weights[:count]).to(y[0].dtype))
        return _ORACLES[asked.name](at, v, self.known.way)

    def told(self) -> Exception | None:
        """What a loss raised since this was asked last, in the library's words."""
        error, self.failure = self.failure, None
        if error is None or isinstance(error, (InputError, RunError)):
            return error
        text = (str(error).strip().splitlines() or [""])[0]
        told = RunError(f"a loss failed in torch: {type(error).__name__}: {text}")
        told.__cause__ = error
        return told


def _in_one_thread(function: Callable[..., list[np.ndarray]], *args: Any) -> list[np.ndarray]:
    """`function(*args)`, whatever the number of torch's threads."""
    threads = torch.get_num_threads()
    if threads == 1:
        return function(*args)
    torch.set_num_threads(1)
    try:
        return function(*args)
    finally:
        torch.set_num_threads(threads)


def _flat(arg: np.ndarray, batch: tuple[int, ...]) -> np.ndarray:
    """With one axis in place of those of `batch`, of as many as there are."""
    return arg.reshape((math.prod(arg.shape[: len(batch)]), *arg.shape[len(batch) :]))


def _lanes(flat: Any, arg: np.ndarray, batch: tuple[int, ...]) -> Any:
    """One for each: those with a length of 1 are shared."""
    lead = arg.shape[: len(batch)]
    if lead == batch:
        return flat
    place = np.broadcast_to(np.arange(len(flat)).reshape(lead), batch).reshape(-1)
    return [flat[k] for k in place.tolist()]
