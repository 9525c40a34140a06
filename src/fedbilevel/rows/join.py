"""Putting the rows of all clients side by side, in the types that JAX will hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import InputError, check
from .alike import check_alike
from .joined import Joined, Part
from .narrow import narrowed


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
        check_alike(read, parts[0][0], name, names[0], level)
    ends = np.cumsum(counts)
    joined = Joined(names, level, parts, counts, ends - counts)
    for read, _ in parts:
        joined.doubts += read.doubts
    for index, like in enumerate(joined.first.leaves):
        flat = np.empty((ends[-1], *like.shape[1:]), like.dtype)
        for (read, chosen), count, end in zip(parts, counts, ends, strict=True):
            flat[end - count : end] = read.leaves[index][chosen]
        joined.leaves.append(narrowed(joined, index, flat))
    return joined
