"""The rows of all clients as users pass them, read: at a glance where they are alike, one by one where they are not.

A million clients are a million small pytrees. Where all are of the first one's structure and hold plain numpy arrays of
its dtypes and shapes, they are compared as columns, a leaf of all clients at once. Anything else has `read` look at every
client, which knows all that is taken, and the sentences for what is not.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from ..errors import InputError
from .alike import check_alike
from .one import Read, read

_BLOCK = 2**8  # clients whose trees are open at a time; of more, Python would look for garbage


@dataclasses.dataclass
class Sets:
    """The clients' rows of one level, or of both.

    Attributes:
        first: the first client's.
        leaves: of each leaf, the arrays of all clients.
        counts: (clients,) how many rows each has.
        reads: every client's, where they had to be looked at one by one; else they are all like the first.
    """

    first: Read
    leaves: list[list[np.ndarray]]
    counts: np.ndarray
    reads: list[Read] | None = None

    @property
    def doubts(self) -> list[str]:
        """Sentences about values that changed on the way."""
        return [doubt for own in self.reads or [self.first] for doubt in own.doubts]

    def check_alike(self, names: Sequence[str], level: str) -> None:
        """Refuse clients whose structure, columns, shapes or dtypes are not the first one's.

        Raises:
            InputError: with the first that differs.
        """
        for own, name in zip((self.reads or [])[1:], names[1:]):  # noqa: B905  names may be more, without reads
            check_alike(own, self.first, name, names[0], level)


def read_all(clients: Sequence[PyTree], names: Sequence[str], level: str = "", least: int = 0) -> Sets:
    """The rows of all clients, of which there is at least one, at a level or for both.

    Args:
        least: how many rows each needs, for a split.

    Raises:
        InputError: what `read` refuses, of the first client of which it does; or too few rows.
    """
    first = read(clients[0], names[0], level)
    found = _columns(clients, first)
    if found is not None:
        counts = found[1]
        for index in map(int, np.flatnonzero(counts < least)[:1]):
            raise _too_few(names[index], int(counts[index]))
        return Sets(first, *found)
    reads = []
    for rows, name in zip(clients, names, strict=True):
        own = read(rows, name, level)
        if len(own.leaves[0]) < least:
            raise _too_few(name, len(own.leaves[0]))
        reads.append(own)
    leaves = [list(column) for column in zip(*(own.leaves for own in reads))] if _as_many(reads) else []  # noqa: B905
    return Sets(reads[0], leaves, np.array([len(own.leaves[0]) for own in reads]), reads)


def _as_many(reads: list[Read]) -> bool:
    return len({len(own.leaves) for own in reads}) == 1


def _too_few(name: str, count: int) -> InputError:
    return InputError(f"{name} has {count} rows, but a split needs at least 2: one for each level.")


def _columns(clients: Sequence[PyTree], first: Read) -> tuple[list[list[np.ndarray]], np.ndarray] | None:
    """(The leaves of all clients, how many rows each has); None if any client is unlike the first in whatever way."""
    given = jax.tree.leaves(first.given)
    leaves: list[list[np.ndarray]] = [[] for _ in given]
    try:
        for begin in range(0, len(clients), _BLOCK):
            opened = map(first.structure.flatten_up_to, clients[begin : begin + _BLOCK])
            for column, block in zip(leaves, zip(*opened, strict=True), strict=True):
                column.extend(block)
    except (ValueError, TypeError):  # another structure
        return None
    counts = None
    for like, column in zip(given, leaves, strict=True):
        if set(map(type, column)) != {np.ndarray} or set(map(_dtype, column)) != {like.dtype}:
            return None
        shapes = set(map(_shape, column))
        if {shape[1:] for shape in shapes} != {like.shape[1:]} or () in shapes:
            return None
        own = np.fromiter(map(len, column), np.int64, len(column))
        if counts is not None and not np.array_equal(own, counts):
            return None
        counts = own
    return None if counts is None else (leaves, counts)


_dtype, _shape = operator.attrgetter("dtype"), operator.attrgetter("shape")
