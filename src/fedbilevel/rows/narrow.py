"""Values that the 32 bits change which JAX holds without `jax_enable_x64`.

Integers that do not fit and floats that become infinite are refused. Floats that become zero, and integers kept as floats
that become equal (time stamps, ids), are a doubt: one warning a call. Other rounding is what 32 bits are. All clients are
looked at together; whose value it is, is asked only when there is one.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..arrays import aligned
from ..errors import InputError, warn
from .joined import Joined
from .values import Whose, shown, whole

WIDER = "use 64 bits (jax_enable_x64, or precision=64 of an app)"


def settle(*levels: Joined) -> None:
    """Warn, once, of what the levels' values became."""
    doubts = [doubt for level in levels for doubt in level.doubts] + _equal(levels)
    doubts = list(dict.fromkeys(doubts))
    if doubts:
        warn(doubts[0] + (f" (And {len(doubts) - 1} more of the kind.)" if len(doubts) > 1 else ""))


def held(dtype: np.dtype) -> np.dtype:
    """The type in which JAX holds values of this one."""
    return np.dtype(jax.dtypes.canonicalize_dtype(whole(dtype)))


def narrowed(joined: Joined, leaf: int, flat: np.ndarray) -> np.ndarray:
    """The same values as JAX holds them."""
    target = held(flat.dtype)
    if flat.dtype.kind in "iu" and target != flat.dtype and flat.size:
        _check_range(joined, leaf, flat, np.iinfo(target))
    cast = flat
    if target != flat.dtype:
        cast = aligned(flat.shape, target)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            np.copyto(cast, flat, casting="unsafe")
    if not jnp.issubdtype(target, jnp.inexact) or not flat.size:
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
    hint = f"number ids anew, subtract an offset, or {WIDER}"
    raise whose.refusal(f"{shown(flat[at])}, which does not fit into {most.dtype},", place, hint)


def _refuse_infinite(joined: Joined, leaf: int, flat: np.ndarray, finite: np.ndarray, target: np.dtype) -> None:
    at = _first(~finite)
    whose, place = _place(joined, leaf, at)
    if np.isfinite(flat[at]):
        what = f"{shown(flat[at])}, which becomes infinite in {target},"
        raise whose.refusal(what, place, f"rescale those values, or {WIDER}")
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
        f"rescale those values, or {WIDER}."
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
    return f"{text}, which become equal in {target}: subtract an offset from that column, or {WIDER}."
