"""What each algorithm costs and needs, and when to use it: the lines of `fedbilevel list`."""

from __future__ import annotations

import dataclasses
import inspect

from ..algorithm import Algorithm
from . import ALGORITHMS


@dataclasses.dataclass(frozen=True)
class Line:
    """A line about an algorithm.

    Attributes:
        summary: what it is.
        rounds: of one iteration (for FedNest's family with truncation=full; the most, where the server draws).
        order: of the derivatives that it asks for, "first" or "second".
        state: whether clients keep anything between rounds.
        asks: "cohort", or "all" where an exchange asks everybody.
        when: when to use it.
    """

    summary: str
    rounds: str
    order: str
    state: bool
    asks: str
    when: str


def about(name: str) -> Line:
    """The line about an algorithm, by its name on the command line."""
    kind = ALGORITHMS[name]
    said, keeps = kind.about, kind.client_init is not Algorithm.client_init
    return Line(summary(kind), said.rounds, said.order, keeps, said.asks, said.when)


def summary(kind: type) -> str:
    """The first line of a class's docstring."""
    return inspect.cleandoc(kind.__doc__ or "").partition("\n")[0]
