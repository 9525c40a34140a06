"""Putting the rows of all clients side by side, in the types that JAX will hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arrays import aligned
from ..errors import InputError, check
from .joined import Chosen, Joined
from .narrow import narrowed
from .sets import Sets

_AT_ONCE = 2**16  # rows that are piled up before those chosen are taken out


def join(sets: Sets, level: str, names: Sequence[str], chosen: Chosen | None = None) -> Joined:
    """Every client's rows, or the chosen ones, side by side.

    Raises:
        InputError: an empty client, clients whose columns, structure, shapes or dtypes differ, NaN or infinite values, or
            values that do not survive in 32 bits.
    """
    counts = sets.counts if chosen is None else chosen.counts
    for index in map(int, np.flatnonzero(counts == 0)):
        raise InputError(f"{names[index]} has no {level} rows: leave it out, or give it at least one row.")
    check(
        counts.sum() < 2**31, lambda: f"{counts.sum()} {level} rows are more than this version can index (2**31 - 1)."
    )
    sets.check_alike(names, level)
    joined = Joined(names, level, sets.first, counts, np.cumsum(counts) - counts, chosen)
    joined.doubts += sets.doubts
    for index, (like, arrays) in enumerate(zip(sets.first.leaves, sets.leaves, strict=True)):
        flat = aligned((int(counts.sum()), *like.shape[1:]), like.dtype)
        _fill(flat, arrays, sets.counts, chosen)
        joined.leaves.append(narrowed(joined, index, flat))
    return joined


def _fill(flat: np.ndarray, arrays: Sequence[np.ndarray], counts: np.ndarray, chosen: Chosen | None) -> None:
    if chosen is None:
        np.concatenate(arrays, out=flat)
        return
    ends = np.cumsum(counts)
    starts, begin = np.concatenate([[0], np.cumsum(chosen.counts)]), 0
    while begin < len(arrays):  # a pile of some clients' rows at a time, and at least of one client
        end = max(begin + 1, int(np.searchsorted(ends, ends[begin] - counts[begin] + _AT_ONCE, side="right")))
        place = chosen.rows[starts[begin] : starts[end]]
        offsets = np.repeat(
            ends[begin:end] - counts[begin:end] - (ends[begin] - counts[begin]), chosen.counts[begin:end]
        )
        flat[starts[begin] : starts[end]] = np.concatenate(arrays[begin:end])[offsets + place]
        begin = end
