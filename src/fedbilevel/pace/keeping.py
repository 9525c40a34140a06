"""States without types: x, y, and more by name. For algorithms from before states were modules of their own."""

from __future__ import annotations

from jaxtyping import PyTree

from ..algorithm import State
from ..watch import attributes


class Keeping(State):
    """A state that holds more than x and y, by name."""

    kept: dict[str, PyTree]


def keeping(x: PyTree, y: PyTree, kept: dict[str, PyTree]) -> State:
    """The state of x, y and what else is kept."""
    return Keeping(x, y, kept) if kept else State(x, y)


def kept_in(state: State) -> dict[str, PyTree]:
    """What a state of any kind holds besides x and y, by name."""
    return {name: part for name, part in attributes(state).items() if name not in ("x", "y")}
