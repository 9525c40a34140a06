"""What a run leaves: its rows, and its end."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from .errors import check
from .exchanges import Protocol


class History(list):
    """The rows of a run, dicts of iteration, rounds, bytes_down, bytes_up, seconds, metrics, diagnostics.

    Row 0 is the start. rounds and bytes are cumulative; seconds leave out compilation and evaluation.
    """

    def to_dataframe(self):
        """The rows as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(list(self))

    def column(self, name: str) -> np.ndarray:
        """One column as an array."""
        check(self and name in self[-1], f"the history has no column {name!r}.")
        return np.array([row.get(name, np.nan) for row in self])


@dataclasses.dataclass
class Result:
    """What `solve` returns.

    Attributes:
        x, y: the last upper and lower variable, structured like the start.
        history: the `History`.
        protocol: the `Protocol` of one iteration.
        state: the algorithm's whole last state.
        iteration: how many iterations were done.
    """

    x: PyTree
    y: PyTree
    history: History
    protocol: Protocol
    state: Any
    iteration: int


def save_variables(result: Result, path: str | os.PathLike[str]) -> None:
    """Write x and y to a numpy file: one array for each leaf, named by its path, as in `x['weight']`."""
    arrays = {}
    for name, tree in (("x", result.x), ("y", result.y)):
        for place, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            if hasattr(leaf, "dtype"):
                arrays[name + jax.tree_util.keystr(place)] = np.asarray(leaf)
    np.savez(path, allow_pickle=False, **arrays)
