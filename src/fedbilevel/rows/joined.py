"""The rows of all clients side by side, in the types that JAX will hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from ..arrays import on_device
from ..errors import InputError, check
from .alike import check_alike
from .narrow import narrowed
from .one import Read
from .values import Whose

Part = tuple[Read, "slice | np.ndarray"]  # a client's rows, and which of them


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
        return jax.tree.unflatten(self.first.structure, [on_device(leaf) for leaf in self.leaves])

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
