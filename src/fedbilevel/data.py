"""The data of all clients, one level beside the other, rows kept flat.

A level holds the rows of every client in one array, client after client, with offsets: nothing is padded in memory
(padding to the largest client costs six times the memory at Dirichlet 0.1), minibatches are gathered straight from
it, and only a full batch is padded, for the clients of one cohort, while it is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from .errors import check
from .problem import Problem, Rows, describe

LevelName = Literal["inner", "outer"]


class ClientRows(eqx.Module):
    """One client's rows at one level: a window on a flat array.

    Attributes:
        rows: pytree of arrays (total, ...), of which the client's are `offset : offset + count`.
        scale: () what the rows' weights sum to: 1, or the client's outer weight over its inner one.
        most: how many rows a full batch is padded to (at least `count`).
        features, at: `Problem.features` of a full batch, leaves (most, ...), and the x they were computed at; or None.
    """

    rows: PyTree[Shaped[Array, "?total ..."]]
    offset: Int[Array, ""]
    count: Int[Array, ""]
    scale: Float[Array, ""]
    most: int = eqx.field(static=True)
    features: PyTree = None
    at: PyTree = None

    def all(self) -> Rows:
        """All rows; padding repeats a real row and has weight zero."""
        place = jnp.arange(self.most, dtype=jnp.int32)
        weights = jnp.where(place < self.count, self.scale / self.count.astype(self.scale.dtype), 0.0)
        examples = self._take(jnp.minimum(place, self.count - 1))
        return Rows(examples, weights, self.count, features=self.features, at=self.at)

    def draw(self, key: Key[Array, ""], stream: Int[Array, ""] | int, size: int | None) -> Rows:
        """`size` rows, uniform with replacement: they depend on the key, the stream and the client's own count only.

        None: all rows, with the key of this draw.
        """
        own = jax.random.fold_in(key, stream)
        if size is None:
            return dataclasses.replace(self.all(), key=own)
        place = random_below(key, stream, jnp.broadcast_to(self.count, (size,)))
        weights = jnp.full((size,), self.scale / size)
        features = jax.tree.map(lambda leaf: leaf.at[place].get(mode="promise_in_bounds"), self.features)
        return Rows(self._take(place), weights, jnp.asarray(size, jnp.int32), own, features, self.at)

    def with_features(self, problem: Problem, x: PyTree) -> ClientRows:
        """The same rows with their features at x computed, once for each."""
        if self.all().computed_at(x):
            return self
        return dataclasses.replace(self, features=problem.row_features(x, self.all().examples), at=x)

    def without_features(self) -> ClientRows:
        """The same rows without computed features."""
        return dataclasses.replace(self, features=None, at=None)

    def _take(self, place):
        index = self.offset + place
        return jax.tree.map(lambda leaf: leaf.at[index].get(mode="promise_in_bounds"), self.rows)


class Level(eqx.Module):
    """One level's rows of all clients.

    Attributes:
        rows: pytree of arrays (total, ...), client after client.
        offsets, counts: (clients,) int32, where each client's rows begin and how many they are.
        scale: (clients,) what each client's row weights sum to.
        most: the largest count.
    """

    rows: PyTree[Shaped[Array, "?total ..."]]
    offsets: Int[Array, " clients"]
    counts: Int[Array, " clients"]
    scale: Float[Array, " clients"]
    most: int = eqx.field(static=True)

    def client(self, index: Int[Array, ""] | int) -> ClientRows:
        """A window on the rows of one client (the index may be traced)."""
        return ClientRows(self.rows, self.offsets[index], self.counts[index], self.scale[index], self.most)

    def alone(self, index: int) -> ClientRows:
        """The rows of one client, cut out and unpadded: what it would hold in a process of its own."""
        start, count = int(self.offsets[index]), int(self.counts[index])
        rows = jax.tree.map(lambda leaf: leaf[start : start + count], self.rows)
        zero = jnp.zeros((), jnp.int32)
        return ClientRows(rows, zero, self.counts[index], self.scale[index], count)


class FederatedData(eqx.Module):
    """The rows of every client for the inner and the outer level; build it with `stack` or `split`.

    Attributes:
        inner, outer: the two levels.
        weights: (clients,) the p_i of the inner level, summing to one; None when all clients count alike.
    """

    inner: Level
    outer: Level
    weights: Float[Array, " clients"] | None = None

    @property
    def clients(self) -> int:
        """How many clients there are."""
        return self.inner.counts.shape[0]

    def count(self, level: LevelName) -> np.ndarray:
        """(clients,) how many rows each client has at a level."""
        return np.asarray(getattr(self, level).counts)

    @classmethod
    def stack(
        cls,
        inner: Sequence[PyTree],
        outer: Sequence[PyTree],
        weights: Literal["rows"] | Sequence[float] | None = None,
        names: Sequence[str] | None = None,
    ) -> FederatedData:
        """Put the clients' own data sets side by side.

        Args:
            inner, outer: one pytree of arrays per client, rows first: leaves are (n_i, ...); n_i may differ between
                clients and levels, everything else must agree.
            weights: the weight p_i of each client in both levels' means: None (all alike), "rows" (at each level
                in proportion to the client's rows there) or numbers (normalised to sum to one).
            names: what to call the clients in messages; None: client 0, client 1, ...

        Raises:
            InputError: no or different numbers of clients, an empty client, clients of other structure, shapes or
                dtypes, leaves of unequal length, NaN or infinite values, or unusable weights.
        """
        whole = lambda clients: [(rows, slice(None)) for rows in clients]
        return cls._join(whole(inner), whole(outer), weights, names)

    @classmethod
    def split(
        cls,
        clients: Sequence[PyTree],
        outer: float,
        key: Key[Array, ""],
        weights: Literal["rows"] | Sequence[float] | None = None,
    ) -> FederatedData:
        """Split each client's one data set at random into inner (training) and outer (validation) rows.

        Args:
            clients: one pytree of arrays per client, leaves (n_i, ...), n_i >= 2.
            outer: the share of rows for the outer level, in (0, 1); each level gets at least one row of each client.
            key: decides which rows go where.
            weights: as for `stack`.

        Raises:
            InputError: as `stack`, or a client with fewer than two rows, or a share outside (0, 1).
        """
        check(0.0 < outer < 1.0, f"outer= is the share of rows for the outer level, between 0 and 1; got {outer}.")
        inside, outside = [], []
        for index, rows in enumerate(clients):
            rows = jax.tree.map(np.asarray, rows)
            count = _length(rows, f"client {index}", "one")
            check(count >= 2, f"client {index} has {count} rows, but a split needs at least 2: one for each level.")
            order = generator(jax.random.fold_in(key, index)).permutation(count)
            held = min(max(round(outer * count), 1), count - 1)
            outside.append((rows, order[:held]))
            inside.append((rows, order[held:]))
        return cls._join(inside, outside, weights)

    @classmethod
    def _join(cls, inner: Sequence[_Part], outer: Sequence[_Part], weights, names=None) -> FederatedData:
        check(len(inner) > 0, "there are no clients: pass one pytree of arrays per client.")
        check(
            len(inner) == len(outer),
            f"every client needs rows at both levels; got {len(inner)} inner and {len(outer)} outer data sets.",
        )
        names = names or [f"client {index}" for index in range(len(inner))]
        one, other = _flatten(inner, "inner", names), _flatten(outer, "outer", names)
        p_inner, p_outer = _weights(weights, one.counts, other.counts)
        m = len(inner)
        uniform = weights is None
        scale = np.ones(m) if uniform else p_outer / p_inner
        as_level = lambda level, scale: Level(
            level.rows,
            jnp.asarray(level.offsets, jnp.int32),
            jnp.asarray(level.counts, jnp.int32),
            jnp.asarray(scale, jnp.result_type(float)),
            int(level.counts.max()),
        )
        return cls(
            as_level(one, np.ones(m)),
            as_level(other, scale),
            None if uniform else jnp.asarray(p_inner, jnp.result_type(float)),
        )


def random_below(key: Key[Array, ""], stream: Int[Array, ""] | int, bounds: Int[Array, " n"]) -> Int[Array, " n"]:
    """(n,) int32, each uniform in [0, bounds[j]); streams (below 2**31) are independent of each other and of `jax.random`.

    One call of the hash behind jax's keys, where `fold_in` and `randint` would make five: half the time to compile a
    program goes into these. A remainder maps its 32 bits, with a bias of bounds / 2**32, below any use.
    """
    n = bounds.shape[0]
    high = jnp.asarray(stream).astype(jnp.uint32) | jnp.uint32(
        2**31
    )  # `jax.random` counts with a high word of small numbers
    counters = jnp.concatenate([jnp.broadcast_to(high, (n,)), jnp.arange(n, dtype=jnp.uint32)])
    bits = threefry_2x32(jax.random.key_data(key), counters)[:n]
    return (bits % bounds.astype(jnp.uint32)).astype(jnp.int32)


def generator(key: Key[Array, ""]) -> np.random.Generator:
    """A numpy generator seeded by a jax key: for what is done once, on the host, over whole data sets."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).astype(np.uint32))


_Part = tuple[PyTree, "slice | np.ndarray"]  # a client's rows, and which of them


class _Flat:
    def __init__(self, rows: PyTree, counts: np.ndarray):
        self.rows, self.counts = rows, counts
        self.offsets = np.concatenate([[0], np.cumsum(counts)[:-1]])


def _length(rows: PyTree, name: str, level: str) -> int:
    leaves = jax.tree.leaves(rows)
    check(leaves, f"{name} has no arrays at the {level} level.")
    check(
        all(leaf.ndim > 0 and len(leaf) == len(leaves[0]) for leaf in leaves),
        f"{name}: the arrays of one data set must have the same number of rows, got {describe(rows)}.",
    )
    return len(leaves[0])


def _flatten(clients: Sequence[_Part], level: LevelName, names: Sequence[str]) -> _Flat:
    """The chosen rows of every client, side by side; each is copied once, straight to its place."""
    clients = [(jax.tree.map(np.asarray, rows), chosen) for rows, chosen in clients]
    length = lambda name, rows, chosen: len(np.arange(_length(rows, name, level))[chosen])
    counts = np.array([length(name, *part) for name, part in zip(names, clients, strict=True)])
    for index in map(int, np.flatnonzero(counts == 0)):
        check(False, f"{names[index]} has no {level} rows: leave it out, or give it at least one row.")
    check(counts.sum() < 2**31, f"{counts.sum()} {level} rows are more than this version can index (2**31 - 1).")
    first = clients[0][0]
    for index, (rows, _) in enumerate(clients):
        check(
            _signature(rows) == _signature(first),
            f"{names[index]} has other {level} data than {names[0]}: {describe(rows)} against {describe(first)} "
            f"(only the number of rows may differ).",
        )
        for leaf in jax.tree.leaves(rows):
            check(
                not np.issubdtype(leaf.dtype, np.inexact) or np.isfinite(leaf).all(),
                f"{names[index]} has NaN or infinite values in its {level} rows: clean or drop them first.",
            )
            check(
                leaf.dtype.kind in "biufcV",  # V: bfloat16 and its like
                f"{names[index]} has {leaf.dtype} values in its {level} rows, which are no numbers: encode them first.",
            )
    ends = np.cumsum(counts)

    def side_by_side(*leaves):
        flat = np.empty((ends[-1], *leaves[0].shape[1:]), leaves[0].dtype)
        for leaf, (_, chosen), count, end in zip(leaves, clients, counts, ends, strict=True):
            flat[end - count : end] = leaf[chosen]
        return jnp.asarray(flat)

    return _Flat(jax.tree.map(side_by_side, *[rows for rows, _ in clients]), counts)


def _signature(rows: PyTree):
    leaves, structure = jax.tree.flatten(rows)
    return structure, [(leaf.shape[1:], leaf.dtype) for leaf in leaves]


def _weights(weights, inner_counts, outer_counts) -> tuple[np.ndarray, np.ndarray]:
    m = len(inner_counts)
    if weights is None:
        return np.full(m, 1 / m), np.full(m, 1 / m)
    if isinstance(weights, str):
        check(weights == "rows", f"weights= is None, 'rows' or one number per client; got {weights!r}.")
        return inner_counts / inner_counts.sum(), outer_counts / outer_counts.sum()
    p = np.asarray(weights, dtype=float)
    check(p.shape == (m,), f"weights= needs one number for each of the {m} clients; got shape {p.shape}.")
    check(
        np.isfinite(p).all() and (p > 0).all(), f"the clients' weights must be positive and finite; got {p.tolist()}."
    )
    return p / p.sum(), p / p.sum()
