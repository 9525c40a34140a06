"""The data of all clients, one level beside the other, rows kept flat.

A level holds the rows of every client in one array, client after client, with offsets: nothing is padded in memory
(padding to the largest client costs six times the memory at Dirichlet 0.1), minibatches are gathered straight from
it, and only a full batch is padded, for the clients of one cohort, while it is used. Where clients differ so much that
padding costs much more than the rows do (one of 100,000 rows beside many of five), full batches are not padded either:
oracles take them block by block (`blocks`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from .arrays import entry, held, on_device
from .blocks import Cut, Sizes, Window, filled
from .errors import InputError, check
from .keys import KeyLike, as_key, random_below
from .problem import Problem, Rows, in_blocks, own_oracles
from .processes import apart
from .rows.alike import check_levels
from .rows.clients import Clients, Names, NamesLike, Numbered, called, levels, listed
from .rows.halves import check_share, halves
from .rows.join import join
from .rows.joined import Chosen
from .rows.narrow import settle
from .rows.sets import Sets, read_all
from .rows.values import shown
from .tables.prepare import prepared_rows, split
from .tables.prepared import Prepared
from .tables.wanted import Prepare, merged
from .threefry import folds

_FAR = 2**14  # clients, from which on what is looked up for each of a cohort is not in the processor's caches
LevelName = Literal["inner", "outer"]
Weights = Literal["rows"] | Sequence[float] | np.ndarray | Array | Mapping[str, float] | None


class ClientRows(eqx.Module):
    """One client's rows at one level: a window on a flat array.

    Attributes:
        rows: pytree of arrays (total, ...), of which the client's are `offset : offset + count`.
        scale: () what the rows' weights sum to: 1, or the client's outer weight over its inner one.
        most: how many rows a full batch is padded to (at least `count`).
        cut: how oracles take a full batch block by block; None: padded.
        features, at: `Problem.features` of a full batch, leaves (rows, ...), and the x they were computed at; or None.
        base: where among these rows the client's begin; None: at the first.
    """

    rows: PyTree[Shaped[Array, "total ..."]]
    offset: Int[Array, ""]
    count: Int[Array, ""]
    scale: Float[Array, ""]
    most: int = eqx.field(static=True)
    features: PyTree = None
    at: PyTree = None
    base: Int[Array, ""] | None = None
    cut: Cut | None = eqx.field(static=True, default=None)

    def all(self) -> Rows:
        """All rows; padding repeats a real row and has weight zero."""
        return self._all(None)

    def draw(self, key: Key[Array, ""], stream: Int[Array, ""] | int, size: int | None) -> Rows:
        """`size` rows, uniform with replacement: they depend on the key, the stream and the client's own count only.

        None: all rows, with the key of this draw.
        """
        own = jax.random.fold_in(key, stream)
        if size is None:
            return self._all(own)
        place = random_below(key, stream, jnp.broadcast_to(self.count, (size,)))
        weights = jnp.full((size,), self.scale / size)
        return Rows(self._take(place), weights, jnp.asarray(size, jnp.int32), own, self._features(place), self.at)

    def with_features(self, problem: Problem, x: PyTree) -> ClientRows:
        """The same rows with their features at x computed, once for each; as they are where that takes too much memory."""
        if self.all().computed_at(x):
            return self
        if self.cut is None or own_oracles(type(problem)):
            return dataclasses.replace(self, features=problem.row_features(x, self.all().examples), at=x, base=None)
        if self.cut.capacity == 0:
            return self.without_features()
        arrays, rest = eqx.partition(problem, eqx.is_array)
        phi = lambda given, examples: eqx.combine(given[0], rest).row_features(given[1], examples)
        features, base = filled(phi, (arrays, x), self._window(None))
        return dataclasses.replace(self, features=features, at=x, base=base)

    def without_features(self) -> ClientRows:
        """The same rows without computed features."""
        return dataclasses.replace(self, features=None, at=None, base=None)

    def _all(self, key: Key[Array, ""] | None) -> Rows:
        place = jnp.arange(self.most, dtype=jnp.int32)
        weights = jnp.where(place < self.count, self.scale / self.count.astype(self.scale.dtype), 0.0)
        inside = jnp.minimum(place, self.count - 1)
        features = self.features if self.base is None else self._features(inside)
        rows = Rows(self._take(inside), weights, self.count, key, features, self.at)
        return rows if self.cut is None else in_blocks(rows, self._window(self.features))

    def _window(self, features: PyTree) -> Window:
        assert self.cut is not None
        base = None if features is None else self.base
        return Window(self.rows, self.offset, self.count, self.scale, self.cut, features, base)

    def _take(self, place: Int[Array, " n"]) -> PyTree:
        index = self.offset + place
        return jax.tree.map(lambda leaf: entry(leaf, index), self.rows)

    def _features(self, place: Int[Array, " n"]) -> PyTree:
        index = place if self.base is None else self.base + place
        return jax.tree.map(lambda leaf: entry(leaf, index), self.features)


class Level(eqx.Module):
    """One level's rows of all clients.

    Attributes:
        rows: pytree of arrays (total, ...), client after client.
        offsets, counts: (clients,) int32, where each client's rows begin and how many they are.
        scale: (clients,) what each client's row weights sum to.
        most: the largest count.
        sizes: how uneven the counts are; None where padding is cheap.
        even: whether they are many, and all have as many rows, whose weights sum to one.
    """

    rows: PyTree[Shaped[Array, "total ..."]]
    offsets: Int[Array, " clients"]
    counts: Int[Array, " clients"]
    scale: Float[Array, " clients"]
    most: int = eqx.field(static=True)
    sizes: Sizes | None = eqx.field(static=True, default=None)
    even: bool = eqx.field(static=True, default=False)

    def client(self, index: Int[Array, ""] | int, cut: Cut | None = None) -> ClientRows:
        """A window on the rows of one client (the index may be traced); how full batches are cut, as `cut` says."""
        if self.even:  # known without a look into arrays that no cache holds
            count = jnp.asarray(self.most, jnp.int32)
            offset, scale = count * index, jnp.ones((), self.scale.dtype)
        else:
            offset, count, scale = (entry(leaf, index) for leaf in (self.offsets, self.counts, self.scale))
        return ClientRows(self.rows, offset, count, scale, self.most, cut=cut)

    def cut(self, at_once: int, keeps: bool = True) -> Cut | None:
        """How full batches of so many clients at once are cut (`blocks.Sizes.cut`); None: they are padded."""
        return None if self.sizes is None else self.sizes.cut(at_once, keeps)

    def alone(self, index: int) -> ClientRows:
        """The rows of one client, cut out and unpadded: what it would hold in a process of its own."""
        start, count = int(self.offsets[index]), int(self.counts[index])
        rows = jax.tree.map(lambda leaf: on_device(np.asarray(leaf)[start : start + count]), self.rows)
        zero = jnp.zeros((), jnp.int32)
        return ClientRows(rows, zero, self.counts[index], self.scale[index], count)


@dataclasses.dataclass(frozen=True)
class Labels:
    """What clients and columns are called: for messages and tables only.

    All are equal, so that data of other names run the program that is compiled already.

    Attributes:
        names: (clients,) of the clients; () where they have none.
        columns: of each level, {path of a table in a client's rows: its columns}.
        prepared: how tables became the rows, where they did.
    """

    names: tuple[str, ...] = ()
    columns: dict[str, dict[str, tuple[str, ...]]] = dataclasses.field(default_factory=dict)
    prepared: Prepared | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labels)

    def __hash__(self) -> int:
        return hash(Labels)


class FederatedData(eqx.Module):
    """The rows of every client for the inner and the outer level; build it with `stack`, `split` or `from_table`.

    Attributes:
        inner, outer: the two levels.
        weights: (clients,) the p_i of the inner level, summing to one; None when all clients count alike.
        labels: what clients and columns are called (see `names`, `columns`).
        slots: (devices * most,) while it runs on a mesh: the clients, those whose rows lie on the same device side by
            side, and -1 where a device has fewer than `most`.
    """

    inner: Level
    outer: Level
    weights: Float[Array, " clients"] | None = None
    labels: Labels = eqx.field(static=True, default=Labels())
    slots: Int[Array, " slots"] | None = None

    @property
    def clients(self) -> int:
        """How many clients there are."""
        return self.inner.counts.shape[0]

    @property
    def names(self) -> tuple[str, ...]:
        """(clients,) what the clients are called in messages and tables."""
        own = self.labels.names
        return own if len(own) == self.clients else tuple(f"client {i}" for i in range(self.clients))

    def columns(self, level: LevelName) -> dict[str, tuple[str, ...]]:
        """The names of the columns of a level's tables, by where a table is in a client's rows ("" where it is all)."""
        return self.labels.columns.get(level, {})

    @property
    def prepared(self) -> Prepared | None:
        """How tables became these rows (`from_table`), for new tables too; None: they came as rows."""
        return self.labels.prepared

    def count(self, level: LevelName) -> np.ndarray:
        """(clients,) how many rows each client has at a level."""
        return np.asarray(getattr(self, level).counts)

    @classmethod
    def stack(
        cls,
        inner: Clients,
        outer: Clients,
        weights: Weights = None,
        names: NamesLike = None,
    ) -> FederatedData:
        """Put the clients' own data sets side by side.

        Args:
            inner, outer: each client's rows, in a list or as {client: rows}. Rows are a pytree of arrays, rows first:
                leaves are (n_i, ...); n_i may differ between clients and levels, everything else must agree. A pandas
                table is an array whose columns have names, which must agree too, between clients and between levels.
                A mapping is clients by name if its values are mappings, tuples, tables or modules; of bare arrays it is
                refused, for it may as well be one data set. An array's first axis is the clients.
            weights: the weight p_i of each client in both levels' means: None (all alike), "rows" (at each level
                in proportion to the client's rows there) or numbers, in a list or by name (normalised to sum to one).
            names: what to call the clients of a list in messages; None: client 0, client 1, ...

        Raises:
            InputError: no or different clients, an empty client, clients of other structure, columns, shapes or
                dtypes, arrays of unequal length, values that are no numbers, missing, NaN or infinite, values that do
                not survive in 32 bits (nothing is narrowed with `jax_enable_x64`), or unusable weights or names.

        Warns:
            FedbilevelWarning: values become zero in 32 bits, or distinct integers kept as floats become equal.
        """
        one, other, names = levels(inner, outer, names)
        inside, outside = read_all(one, names, "inner"), read_all(other, names, "outer")
        return cls._join(inside, outside, (None, None), weights, names)

    @classmethod
    def split(
        cls,
        clients: Clients,
        outer: float,
        key: KeyLike,
        weights: Weights = None,
        names: NamesLike = None,
    ) -> FederatedData:
        """Split each client's one data set at random into inner (training) and outer (validation) rows.

        Args:
            clients: each client's rows, as for `stack`; n_i >= 2.
            outer: the share of rows for the outer level, in (0, 1); each level gets at least one row of each client.
            key: decides which rows go where.
            weights, names: as for `stack`.

        Raises:
            InputError: as `stack`, or a client with fewer than two rows, or a share outside (0, 1).

        Warns:
            FedbilevelWarning: as `stack`.
        """
        outer = check_share(outer)
        key, sets = as_key(key), listed(clients, "clients")
        names = called(clients, names, len(sets))
        check(sets, "there are no clients: pass one pytree of arrays per client.")
        own = read_all(sets, names, least=2)
        chosen = halves(own.counts, outer, folds(key, len(sets)))
        return cls._join(own, own, chosen, weights, names)

    @classmethod
    def from_table(
        cls,
        source: object,
        client: str | None = None,
        label: str | None = None,
        outer: float = 0.3,
        key: KeyLike | None = None,
        drop: Sequence[str] = (),
        stratify: bool | str | None = None,
        columns: Literal["together", "separate"] | None = None,
        prepare: Prepare | None = None,
        weights: Weights = None,
    ) -> FederatedData:
        """Rows made of tables: each client's split at random into inner and outer rows, then prepared.

        What is missing is filled in, numbers are standardised and categories become columns, by what the clients' INNER
        rows say together: `Prepare` tells how, and what of it would travel over a network. `data.prepared` has what
        came of it, and makes rows of new tables; `data.columns` has the names of a row's numbers.

        Args:
            source: a pandas or polars table, the path of a CSV or Parquet file, a Hugging Face `Dataset`; or one of these
                for each client, by name, in a list or in a folder with a file for each; or a partitioner of
                flwr-datasets.
            client: the column that says whose a row is; None: the source is by client already.
            label, drop, columns: as of `Prepare`, where `prepare` is not given or does not say.
            outer: the share of rows for the outer level, in (0, 1); each level gets at least one row of each client.
            key: decides which rows go where, as in `split`; None: `jax.random.key(0)`.
            stratify: the column of each of whose values a client's levels have the same share; True: the label.
            prepare: what is wanted; None: `Prepare()`.
            weights: as for `stack`.

        Returns:
            data whose rows are {"a": float32 (columns,), "b": int32 or float32 ()}, or an array a column, by name.

        Raises:
            InputError: there is no such file, column or client; clients' columns differ; a column holds what cannot be
                made a number; a label is missing; a client has fewer than two rows; a share outside (0, 1).

        Warns:
            FedbilevelWarning: as `stack`, or a column is the same in all inner rows.
        """
        wanted = merged(prepare, label, drop, columns, client)
        drawn = as_key(jax.random.key(0) if key is None else key)
        both = split(source, client, outer, stratify, wanted.label, lambda count: folds(drawn, count))
        rows, prepared = prepared_rows(both, wanted, () if client is None else (client,))
        inner, outside = ({name: pair[level] for name, pair in rows.items()} for level in (0, 1))
        return cls.stack(inner, outside, weights).with_prepared(prepared)

    def with_prepared(self, prepared: Prepared) -> FederatedData:
        """The same data, as tables became them: for names of columns, and new tables."""
        named = {level: prepared.named() for level in ("inner", "outer")}
        return dataclasses.replace(self, labels=dataclasses.replace(self.labels, columns=named, prepared=prepared))

    @classmethod
    def _join(
        cls, inner: Sets, outer: Sets, chosen: tuple[Chosen | None, Chosen | None], weights: Weights, names: Names
    ) -> FederatedData:
        one, other = join(inner, "inner", names, chosen[0]), join(outer, "outer", names, chosen[1])
        check_levels(names[0], one.first, other.first)
        settle(one, other)
        p_inner, p_outer = client_weights(weights, one.counts, other.counts, names)
        m = len(one.counts)
        uniform = weights is None
        scale = np.ones(m) if uniform else p_outer / p_inner
        as_level = lambda level, scale: Level(
            level.hand_over(),
            held(level.offsets, np.int32),
            held(level.counts, np.int32),
            held(scale),
            int(level.counts.max()),
            Sizes.of(level.counts),
            m >= _FAR and bool((level.counts == level.counts[0]).all() and (scale == 1).all()),
        )
        return cls(
            as_level(one, np.ones(m)),
            as_level(other, scale),
            None if uniform else held(p_inner),
            Labels(
                () if isinstance(names, Numbered) else tuple(names),
                {level.level: level.columns for level in (one, other)},
            ),
        )


def check_whole(data: FederatedData, what: str) -> None:
    """Refuse data whose rows are loaded by several processes.

    Args:
        what: what needs all rows in this process.

    Raises:
        InputError: they are.
    """
    whole = not any(map(apart, jax.tree.leaves((data.inner.rows, data.outer.rows))))
    check(
        whole,
        f"{what} needs all rows in one process, and each has loaded its own clients' alone: run the data on "
        "fedbilevel.Simulation(mesh=...), or load them without mesh=.",
    )


def client_weights(
    weights: Weights, inner_counts: np.ndarray, outer_counts: np.ndarray, names: Names
) -> tuple[np.ndarray, np.ndarray]:
    m = len(inner_counts)
    if weights is None:
        return np.full(m, 1 / m), np.full(m, 1 / m)
    if isinstance(weights, str):
        check(weights == "rows", f"weights= is None, 'rows' or one number per client; got {weights!r}.")
        return inner_counts / inner_counts.sum(), outer_counts / outer_counts.sum()
    if isinstance(weights, Mapping):
        given = dict(zip(called(weights, None, len(weights)), weights.values(), strict=True))
        other = sorted(set(given) ^ set(names))
        check(not other, f"weights= by name needs those of the clients; {other[:1]} is of one of the two only.")
        weights = [given[name] for name in names]
    try:
        p = np.asarray(weights, dtype=float)
    except (TypeError, ValueError):
        raise InputError(f"weights= is None, 'rows' or one number per client; got {shown(weights)}.") from None
    check(p.shape == (m,), f"weights= needs one number for each of the {m} clients; got shape {p.shape}.")
    bad = ~(np.isfinite(p) & (p > 0))
    first = int(np.argmax(bad))
    check(not bad.any(), f"the clients' weights must be positive and finite; {names[first]} has {p[first]}.")
    p = p / p.max()
    p = p / p.sum()
    lost = p < np.finfo(jnp.result_type(float)).tiny
    first = int(np.argmax(lost))
    check(not lost.any(), f"the weight of {names[first]} is {p[first]:.3g} of all, which is 0 here: leave it out.")
    return p, p
