"""Arrays of another library, for x, y and rows: what a room above has made known is taken, and given back as it came.

Nothing here imports such a library. `fedbilevel.torch` makes tensors known when it is imported.
"""

from __future__ import annotations

import abc
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from .arrays import Concrete, numbers


class Foreign(abc.ABC):
    """A library's arrays.

    Attributes:
        name: of the library, in messages.
    """

    name: str

    @abc.abstractmethod
    def owns(self, leaf: Any) -> bool:
        """Whether a leaf is one of its arrays."""

    @abc.abstractmethod
    def variable(self, leaf: Any, where: str) -> np.ndarray:
        """A copy of an array of x or y.

        Args:
            where: what it is, in messages: "x['weight']".

        Raises:
            InputError: it cannot be optimised.
        """

    @abc.abstractmethod
    def given_back(self, array: np.ndarray) -> Any:
        """Numbers that nobody else holds, as one of its arrays."""

    @abc.abstractmethod
    def rows(self, rows: PyTree) -> PyTree:
        """A client's rows with numpy's arrays in place of the library's arrays and data sets.

        Raises:
            InputError: it is one of its data sets, and cannot be read.
        """

    @abc.abstractmethod
    def data_set(self, rows: Any) -> bool:
        """Whether it is one of the library's own data sets."""


_KNOWN: list[Foreign] = []


def make_known(library: Foreign) -> None:
    """Have a library's arrays taken, from now on."""
    _KNOWN.append(library)


def library_of(leaf: Any) -> Foreign | None:
    """Whose array a leaf is; None for one that nobody has made known."""
    return next((library for library in _KNOWN if library.owns(leaf)), None)


def is_data_set(rows: Any) -> bool:
    """Whether it is a data set of a library that is known."""
    return any(library.data_set(rows) for library in _KNOWN)


def native(rows: PyTree) -> PyTree:
    """A client's rows, with numpy's arrays in place of a library's.

    Raises:
        InputError: a data set that cannot be read.
    """
    for library in _KNOWN:
        rows = library.rows(rows)
    return rows


class Came:
    """Stands in the rest of x or y where there was another library's array."""

    def __init__(self, library: Foreign):
        self.library = library

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Came) and other.library is self.library

    def __hash__(self) -> int:
        return hash(self.library.name)

    def __repr__(self) -> str:
        return f"an array of {self.library.name}"


def as_given(tree: PyTree, rest: PyTree) -> PyTree:
    """A tree like x (or y) with another library's arrays where x had them, which share no memory with it.

    Args:
        tree: of arrays; None where there is nothing to give.
        rest: the other part of x, as `trainable` leaves it.
    """
    if tree is None or not any(isinstance(leaf, Came) for leaf in jax.tree.leaves(rest)):
        return tree
    none = lambda leaf: leaf is None
    return jax.tree.map(_back, tree, rest, is_leaf=none)


def _back(leaf: Any, mark: Any) -> Any:
    if not isinstance(mark, Came) or not isinstance(leaf, Concrete):
        return leaf
    return mark.library.given_back(np.array(numbers(leaf)))


def without_marks(rest: PyTree) -> PyTree:
    """The rest of x or y, with None where an array came from another library."""
    return jax.tree.map(lambda leaf: None if isinstance(leaf, Came) else leaf, rest)
