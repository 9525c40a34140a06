"""The rows of all clients side by side, and whose each of them is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from ..arrays import on_device
from .one import Read
from .values import Whose

Part = tuple[Read, slice | np.ndarray]  # a client's rows, and which of them


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
