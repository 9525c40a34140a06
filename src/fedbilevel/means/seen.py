"""What a client method asks of the outer loss, noted while it runs (which is while it is traced)."""

from __future__ import annotations

import copy
import dataclasses
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from ..errors import check
from ..federation import Client
from ..jaxprs import usable
from ..oracles import around
from ..problem import Problem, Rows

_OUTER = ("outer_value", "outer_gradients")


class Told(eqx.Module):
    """A client's own means, as a part of its reply.

    Attributes:
        means: over its outer rows, at the x and y of the exchange.
        sampled: whether these are a minibatch.
    """

    means: PyTree
    sampled: bool = eqx.field(static=True)


def brings(reply: PyTree) -> bool:
    """Whether a reply brings a client's means."""
    is_told = lambda part: isinstance(part, Told)
    return any(map(is_told, jax.tree.leaves(reply, is_leaf=is_told)))


@dataclasses.dataclass(eq=False)
class Notes:
    """What was noted.

    Attributes:
        asked: (x, y) of each time that the outer loss was asked for.
        size, draw: of the first outer rows that the method took; None: all of them.
    """

    asked: list[tuple[PyTree, PyTree]] = dataclasses.field(default_factory=list)
    size: int | None = None
    draw: int = 0
    took: bool = False


class Watched(Client):
    """A client whose method is watched."""

    notes: Notes = eqx.field(static=True, default_factory=Notes)

    @property
    def outer(self) -> Rows:
        """All rows of the outer level."""
        self._note(None, 0)
        return super().outer

    def batch(self, level: Literal["inner", "outer"], size: int | None = None, draw: int | Int[Array, ""] = 0) -> Rows:
        """As `Client.batch`."""
        if level == "outer":
            self._note(size, draw)
        return super().batch(level, size, draw)

    def _note(self, size: int | None, draw: int | Int[Array, ""]) -> None:
        if not self.notes.took:
            self.notes.took, self.notes.size = True, size
            self.notes.draw = draw if isinstance(draw, int) else 0


def watched(client: Client, means: PyTree) -> Watched:
    """The client, for which F is linear around these means, with notes of what its method asks."""
    notes = Notes()
    problem = _noting(around(client.problem, means), notes)
    return Watched(problem, client.rows, client.state, client.key, client.wanted, client.index, notes)


def _noting(problem: Problem, notes: Notes) -> Problem:
    noting = copy.copy(problem)
    for name in _OUTER:
        object.__setattr__(noting, name, _Noted(getattr(problem, name), notes))
    return noting


class _Noted:
    """An oracle of the outer loss, whose x and y are noted."""

    def __init__(self, oracle, notes: Notes):
        self.oracle, self.notes = oracle, notes

    def __call__(self, x: PyTree, y: PyTree, rows: Rows) -> PyTree:
        self.notes.asked.append((x, y))
        return self.oracle(x, y, rows)


def told(client: Client, notes: Notes, message: tuple, who: str) -> Told | None:
    """The client's means at the x and y at which its method asked for the outer loss; None where it did not.

    It is the first x and y that can be had after the method: one in a loop (of local steps, say) cannot. Then it is where
    such a loop begins: at the first part of the message that looks like x, and the first after it that looks like y.

    Raises:
        InputError: the message has no such parts.
    """
    if not notes.asked:
        return None
    here = next((pair for pair in notes.asked if usable(pair)), None)
    x, y = here or _in_message(message, *notes.asked[0], who)
    sampled = notes.size is not None
    rows = client.batch("outer", notes.size, notes.draw) if sampled else client.outer
    return Told(client.problem.means(x, y, rows), sampled)


def _in_message(message: tuple, x: PyTree, y: PyTree, who: str) -> tuple[PyTree, PyTree]:
    like = lambda one: lambda node: _shapes(node) == _shapes(one)
    is_x, is_y = like(x), like(y)
    parts = jax.tree.leaves(message, is_leaf=lambda node: is_x(node) or is_y(node))
    first = next((k for k, part in enumerate(parts) if is_x(part)), None)
    rest = [] if first is None else [part for part in parts[first + 1 :] if is_y(part)]
    check(
        first is not None and rest,
        f"{who} asks for the outer loss within a loop, and its message has no x with a y after it, at which the means of "
        "an outer loss of means would be taken: send x and y, in this order.",
    )
    return parts[first], rest[0]  # pyright: ignore[reportArgumentType, reportCallIssue]


def _shapes(tree: PyTree) -> tuple:
    leaves, structure = jax.tree.flatten(tree)
    arrays = all(isinstance(leaf, jax.Array) or hasattr(leaf, "dtype") for leaf in leaves)
    return (structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)) if arrays else (None,)
