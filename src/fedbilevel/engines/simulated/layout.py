"""How a client's state lies in a row of bytes, leaf after leaf."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ...arrays import Structure

_BLOCK = 2**24  # bytes


class Leaf(NamedTuple):
    """Shape and dtype (by name) of one leaf."""

    shape: tuple[int, ...]
    name: str

    @property
    def dtype(self) -> np.dtype:
        return jnp.dtype(self.name)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Layout:
    """What one client's state looks like.

    Attributes:
        structure: its pytree.
        leaves: shapes and dtypes.
    """

    structure: Structure
    leaves: tuple[Leaf, ...]

    @property
    def kind(self) -> np.dtype:
        """A row."""
        return np.dtype((np.void, max(1, sum(leaf.bytes for leaf in self.leaves))))

    @property
    def at_once(self) -> int:
        """How many rows are looked at together where there are many."""
        return max(1, _BLOCK // self.kind.itemsize)

    def check(self, index: np.ndarray, leaves: Sequence[np.ndarray], clients: int) -> None:
        """See that arrays are those of some clients.

        Raises:
            ValueError: they are others.
        """
        shown = lambda leaf: f"{leaf.dtype.name}{list(leaf.shape)}"
        wanted = [Leaf((len(index), *leaf.shape), leaf.name) for leaf in self.leaves]
        if len(wanted) != len(leaves):
            raise ValueError(f"{len(leaves)} arrays where {len(wanted)} belong")
        for one, found in zip(wanted, leaves, strict=True):
            if (one.shape, one.dtype) != (found.shape, found.dtype):
                raise ValueError(f"{shown(found)} where {one.name}{list(one.shape)} belongs")
        if len(index) and not (index.min() >= 0 and index.max() < clients):
            raise ValueError(f"rows of {clients} clients, and one of number {index.max()}")

    def packed(self, leaves: Sequence[np.ndarray]) -> np.ndarray:
        """Leaves (rows, ...) as (rows,) bytes."""
        rows = len(leaves[0])
        flat = [np.ascontiguousarray(leaf).reshape(rows, -1).view(np.uint8).reshape(rows, -1) for leaf in leaves]
        return np.ascontiguousarray(np.concatenate(flat, axis=1)).view(self.kind)[:, 0]

    def unpacked(self, rows: np.ndarray) -> list[np.ndarray]:
        """(rows,) bytes as leaves (rows, ...)."""
        table, found, first = rows.view(np.uint8).reshape(len(rows), -1), [], 0
        for leaf in self.leaves:
            part = np.ascontiguousarray(table[:, first : first + leaf.bytes])
            found.append(part.view(leaf.dtype).reshape(len(rows), *leaf.shape))
            first += leaf.bytes
        return found


def layout_of(state: PyTree) -> Layout:
    """Of one client's state."""
    leaves, structure = jax.tree.flatten(state)
    return Layout(structure, tuple(Leaf(tuple(leaf.shape), np.dtype(leaf.dtype).name) for leaf in leaves))
