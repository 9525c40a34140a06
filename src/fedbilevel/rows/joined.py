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


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Which of the clients' rows are meant.

    Attributes:
        rows: (total,) client after client, the numbers of the rows within the client's own.
        counts: (clients,) how many of each.
    """

    rows: np.ndarray
    counts: np.ndarray


@dataclasses.dataclass
class Joined:
    """One level's rows of all clients, each copied once, straight to its place.

    Attributes:
        names, level: whose rows these are, at which level.
        first: the first client's rows, which have the structure of all.
        counts, offsets: (clients,) how many rows each client has, and where they begin.
        chosen: which rows of the clients they are; None for all.
        leaves: arrays (total, ...) in the types that JAX will hold.
        doubts: sentences about values that changed, and
        suspects: leaves with integers so large that some may have become equal, as they were.
    """

    names: Sequence[str]
    level: str
    first: Read
    counts: np.ndarray
    offsets: np.ndarray
    chosen: Chosen | None = None
    leaves: list[np.ndarray] = dataclasses.field(default_factory=list)
    doubts: list[str] = dataclasses.field(default_factory=list)
    suspects: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    def hand_over(self) -> PyTree:
        """The arrays in their pytree, as JAX holds them; numpy's are let go one by one."""
        self.suspects.clear()
        held = [on_device(self.leaves.pop(0)) for _ in range(len(self.leaves))]
        return jax.tree.unflatten(self.first.structure, held)

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """The names of the columns of each table, by its path."""
        if not any(self.first.columns):
            return {}
        return {path: own for path, own in zip(self.first.paths, self.first.columns, strict=True) if own is not None}

    def owner(self, row: int) -> tuple[Whose, int]:
        """(Whose a row is, which of that client's rows)."""
        client = int(np.searchsorted(self.offsets, row, side="right")) - 1
        own = row - self.offsets[client] if self.chosen is None else self.chosen.rows[row]
        return Whose(self.names[client], f"{self.level} rows"), int(own)
