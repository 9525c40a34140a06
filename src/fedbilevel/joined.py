"""The rows of all clients side by side, in the types that JAX will hold; a value that those change is found here.

Without `jax_enable_x64` JAX holds 32 bits. Integers that do not fit and floats that become infinite are refused. Floats
that become zero, and integers kept as floats that become equal (time stamps, ids), are a doubt: one warning a call. Other
rounding is what 32 bits are. All clients are looked at together; whose value it is, is asked only when there is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .errors import InputError, check, warn
from .problem import describe
from .rows import Read, is_table
from .values import Whose, columns_apart, shown, spot, whole

Part = tuple[Read, "slice | np.ndarray"]  # a client's rows, and which of them

_WIDER = "use 64 bits (jax_enable_x64, or precision=64 of an app)"


@dataclasses.dataclass
class Joined:
    """One level's rows of all clients, each copied once, straight to its place.

    Attributes:
        names, level, parts: whose rows these are, at which level, and what they come from.
        counts, offsets: (clients,) how many rows each client has, and where they begin.
        leaves: arrays (total, ...) in the types that JAX will hold.
        doubts: sentences about values that changed, and
        suspects: leaves with integers so large that some may have become equal, as they were.
    """

    names: Sequence[str]
    level: str
    parts: Sequence[Part]
    counts: np.ndarray
    offsets: np.ndarray
    leaves: list[np.ndarray] = dataclasses.field(default_factory=list)
    doubts: list[str] = dataclasses.field(default_factory=list)
    suspects: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def first(self) -> Read:
        """The first client's rows, which have the structure of all."""
        return self.parts[0][0]

    @property
    def rows(self) -> PyTree:
        """The arrays in their pytree, as JAX holds them."""
        return jax.tree.unflatten(self.first.structure, [jnp.asarray(leaf) for leaf in self.leaves])

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """The names of the columns of each table, by its path."""
        if not any(self.first.columns):
            return {}
        return {path: own for path, own in zip(self.first.paths, self.first.columns, strict=True) if own is not None}

    def owner(self, row: int) -> tuple[Whose, int]:
        """(Whose a row is, which of that client's rows)."""
        client = int(np.searchsorted(self.offsets, row, side="right")) - 1
        read, chosen = self.parts[client]
        own = np.arange(len(read.leaves[0]))[chosen][row - self.offsets[client]]
        return Whose(self.names[client], f"{self.level} rows"), int(own)


def join(parts: Sequence[Part], level: str, names: Sequence[str]) -> Joined:
    """Every client's chosen rows, side by side.

    Raises:
        InputError: an empty client, clients whose columns, structure, shapes or dtypes differ, NaN or infinite values, or
            values that do not survive in 32 bits.
    """
    counts = np.array([len(read.leaves[0]) if isinstance(c, slice) else len(c) for read, c in parts])
    for index in map(int, np.flatnonzero(counts == 0)):
        raise InputError(f"{names[index]} has no {level} rows: leave it out, or give it at least one row.")
    check(counts.sum() < 2**31, f"{counts.sum()} {level} rows are more than this version can index (2**31 - 1).")
    for (read, _), name in zip(parts[1:], names[1:], strict=True):
        _check_alike(read, parts[0][0], name, names[0], level)
    ends = np.cumsum(counts)
    joined = Joined(names, level, parts, counts, ends - counts)
    for read, _ in parts:
        joined.doubts += read.doubts
    for index, like in enumerate(joined.first.leaves):
        flat = np.empty((ends[-1], *like.shape[1:]), like.dtype)
        for (read, chosen), count, end in zip(parts, counts, ends, strict=True):
            flat[end - count : end] = read.leaves[index][chosen]
        joined.leaves.append(_narrowed(joined, index, flat))
    return joined


def check_levels(inner: Joined, outer: Joined) -> None:
    """Refuse tables at the same place whose columns differ between the levels.

    Raises:
        InputError: with the column and the client.
    """
    if not any(columns is not None for columns in inner.first.columns):
        return
    tables = [
        {path: columns for path, columns, leaf in zip(one.paths, one.columns, one.leaves, strict=True) if leaf.ndim > 1}
        for one in (inner.first, outer.first)
    ]
    for path in tables[0].keys() & tables[1].keys():
        mine, theirs = tables[1][path], tables[0][path]
        if mine is None or theirs is None:
            continue
        apart = columns_apart(mine, theirs, "its outer table", "the inner one")
        check(
            not apart,
            f"{inner.names[0]}: {apart}{f', at {path}' if path else ''}: a row is the vector of its columns, in one "
            "order at both levels (or pass .to_numpy(), where they are meant to differ).",
        )


def settle(*levels: Joined) -> None:
    """Warn, once, of what the levels' values became."""
    doubts = [doubt for level in levels for doubt in level.doubts] + _equal(levels)
    doubts = list(dict.fromkeys(doubts))
    if doubts:
        warn(doubts[0] + (f" (And {len(doubts) - 1} more of the kind.)" if len(doubts) > 1 else ""))


def held(dtype: np.dtype) -> np.dtype:
    """The type in which JAX holds values of this one."""
    return np.dtype(jax.dtypes.canonicalize_dtype(whole(dtype)))


# Alike ----------------------------------------------------------------------------------------------------------------


def _check_alike(read: Read, first: Read, name: str, other: str, level: str) -> None:
    if read.structure != first.structure:
        raise InputError(
            f"{name} has other {level} data than {other}: {describe(read.rows)} against {describe(first.rows)} "
            "(only the number of rows may differ)."
        )
    if read.columns != first.columns:
        leaf = next(k for k, (a, b) in enumerate(zip(read.columns, first.columns, strict=True)) if a != b)
        apart = columns_apart(read.columns[leaf], first.columns[leaf], name, other)
        hint = "a row is the vector of its columns, so give all clients the same ones in the same order"
        raise InputError(f"{apart}, in its {level} rows{spot(read.paths[leaf], None)}: {hint}.")
    for leaf, (mine, theirs) in enumerate(zip(read.leaves, first.leaves, strict=True)):
        if mine.shape[1:] != theirs.shape[1:] or mine.dtype != theirs.dtype:
            place, said = spot(read.paths[leaf], None), [f"{describe(one)}" for one in (mine, theirs)]
            column = _other_type(read, first, leaf)
            if column is not None:
                place, said = spot(read.paths[leaf], (column[0],)), list(column[1:])
            raise InputError(
                f"{name} has other {level} data than {other}{place}: {said[0]} against {said[1]} "
                "(only the number of rows may differ)."
            )


def _other_type(read: Read, first: Read, leaf: int) -> tuple[str, str, str] | None:
    """(A column that is of another type, its type, the first client's), if the leaf is a table."""
    mine, theirs = (jax.tree.leaves(one.given)[leaf] for one in (read, first))
    names = read.columns[leaf]
    if names is None or not (is_table(mine) and is_table(theirs)) or len(names) == 1:
        return None
    for name, one, other in zip(names, mine.dtypes, theirs.dtypes, strict=True):
        if one != other:
            return name, str(one), str(other)
    return None


# Narrowed -------------------------------------------------------------------------------------------------------------


def _narrowed(joined: Joined, leaf: int, flat: np.ndarray) -> np.ndarray:
    """The same values as JAX holds them."""
    target = held(flat.dtype)
    if flat.dtype.kind in "iu" and target != flat.dtype:
        _check_range(joined, leaf, flat, np.iinfo(target))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        cast = flat if target == flat.dtype else flat.astype(target)
    if not jnp.issubdtype(target, jnp.inexact):
        return cast
    finite = np.isfinite(cast)
    if not finite.all():
        _refuse_infinite(joined, leaf, flat, finite, target)
    if target != flat.dtype:
        _look_for_zeros(joined, leaf, flat, cast)
        if not np.iscomplexobj(flat) and np.abs(flat).max() >= _exact(target):
            joined.suspects[leaf] = flat
    return cast


def _exact(target: np.dtype) -> int:
    """Up to where a type of floats holds every integer."""
    return 2 ** (np.finfo(target).nmant + 1)


def _place(joined: Joined, leaf: int, at: tuple[int, ...]) -> tuple[Whose, str]:
    """(Whose value it is at an index of the joined leaf, where there)."""
    whose, row = joined.owner(at[0])
    return whose, f"{joined.first.spot(leaf, at[1:])}, row {row}"


def _first(bad: np.ndarray) -> tuple[int, ...]:
    return tuple(map(int, np.unravel_index(np.argmax(bad), bad.shape)))


def _check_range(joined: Joined, leaf: int, flat: np.ndarray, most: np.iinfo) -> None:
    if int(flat.max()) <= most.max and int(flat.min()) >= most.min:
        return
    at = _first((flat > most.max) | (flat < most.min))
    whose, place = _place(joined, leaf, at)
    hint = f"number ids anew, subtract an offset, or {_WIDER}"
    raise whose.refusal(f"{shown(flat[at])}, which does not fit into {most.dtype},", place, hint)


def _refuse_infinite(joined: Joined, leaf: int, flat: np.ndarray, finite: np.ndarray, target: np.dtype) -> None:
    at = _first(~finite)
    whose, place = _place(joined, leaf, at)
    if np.isfinite(flat[at]):
        what = f"{shown(flat[at])}, which becomes infinite in {target},"
        raise whose.refusal(what, place, f"rescale those values, or {_WIDER}")
    text = f"{whose.name} has NaN or infinite values in its {whose.rows}{place} (the first is {shown(flat[at])})"
    raise InputError(f"{text}: clean or drop them first.")


def _look_for_zeros(joined: Joined, leaf: int, flat: np.ndarray, cast: np.ndarray) -> None:
    """Doubt what becomes zero: below the least normal number, where XLA rounds to zero too."""
    least = np.finfo(cast.dtype).tiny
    gone = np.zeros(flat.shape, bool)
    for part in (np.real, np.imag) if np.iscomplexobj(flat) else (np.asarray,):
        small = np.abs(part(cast)) < least
        if small.any():
            gone |= small & (part(flat) != 0)
    if not gone.any():
        return
    at = _first(gone)
    whose, place = _place(joined, leaf, at)
    joined.doubts.append(
        f"{whose.name} has {shown(flat[at])} in its {whose.rows}{place}, which becomes 0.0 in {cast.dtype}: "
        f"rescale those values, or {_WIDER}."
    )


def _equal(levels: Sequence[Joined]) -> list[str]:
    """Of every column of integers kept as floats, two that became equal; a column is looked at in both levels at once."""
    groups: dict[tuple, list[tuple[Joined, int]]] = {}
    for level in levels:
        for leaf, flat in level.suspects.items():
            key = (level.first.paths[leaf], level.first.columns[leaf], flat.shape[1:])
            groups.setdefault(key, []).append((level, leaf))
    found = []
    for (_, _, shape), group in groups.items():
        for column in np.ndindex(shape):
            pair = _pair(group, column)
            if pair is not None:
                found.append(_merged(group, column, *pair))
    return found


def _pair(group: list[tuple[Joined, int]], column: tuple[int, ...]) -> tuple[int, int] | None:
    """Two rows, counted through the levels, whose values of a column become equal; of clients that have integers there."""
    values, places, begin = [], [], 0
    for level, leaf in group:
        own = level.suspects[leaf][(slice(None), *column)]
        whole = np.logical_and.reduceat(own == np.floor(own), level.offsets)
        chosen = np.flatnonzero(np.repeat(whole, level.counts))
        values.append(own[chosen])
        places.append(begin + chosen)
        begin += len(own)
    value, place = np.concatenate(values), np.concatenate(places)
    if not len(value) or np.abs(value).max() <= _exact(held(value.dtype)):
        return None
    value, index = np.unique(value, return_index=True)
    same = np.flatnonzero(np.diff(value.astype(held(value.dtype))) == 0)
    if not len(same):
        return None
    one, other = place[index[same]], place[index[same + 1]]
    sizes = np.concatenate([level.counts for level, _ in group])
    clients = [np.searchsorted(np.cumsum(sizes), rows, side="right") for rows in (one, other)]
    best = int(np.argmax(clients[0] == clients[1]))  # two of one client, if there are
    return int(one[best]), int(other[best])


def _merged(group: list[tuple[Joined, int]], column: tuple[int, ...], *rows: int) -> str:
    said = []
    for row in rows:
        for level, leaf in group:
            if row < len(level.suspects[leaf]):
                whose, _ = level.owner(row)
                value = level.suspects[leaf][(row, *column)]
                said.append((whose, value, level.first.spot(leaf, column), held(value.dtype)))
                break
            row -= len(level.suspects[leaf])
    (one, a, place, target), (other, b, _, _) = said
    a, b = (str(int(value)) for value in (a, b))
    if one.name == other.name:
        where = one.rows if one == other else "rows"  # one at each level
        text = f"{one.name} has {a} and {b} in its {where}{place}"
    else:
        text = f"{one.name} has {a}, and {other.name} has {b} in its {other.rows}{place}"
    return f"{text}, which become equal in {target}: subtract an offset from that column, or {_WIDER}."
