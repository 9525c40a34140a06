"""The algorithms, and their names on the command line: those of `shipped`, by what their classes say (`About`).

A file holds one final class, whole: its equations, settings, state, server program and client methods. What several share
stands in `components`.
"""

import dataclasses
from collections.abc import Mapping

from ..algorithm import Algorithm, Setting
from . import shipped
from .shipped import *  # noqa: F403  what ships is what there is, and a type checker reads it in `shipped`

ALGORITHMS: dict[str, type[Algorithm]] = {
    kind.about.name: kind for kind in vars(shipped).values() if isinstance(kind, type)
}

# whose hypergradient is made of the clients' own Hessians, and biased where clients differ
BIASED = frozenset(name for name, kind in ALGORITHMS.items() if kind.about.biased)
# those that ask for no second derivative
FIRST_ORDER = frozenset(name for name, kind in ALGORITHMS.items() if kind.about.order == "first")

# What the conformance suite sets where an algorithm has it: to keep every option at work, and to be exact.
_BUSY: dict[str, Setting] = {
    "local_steps": 2, "outer_steps": 2, "batch_size": 2, "inner_lr": 0.05, "outer_lr": 0.05, "inner_rounds": 2,
    "hessian_lr": 0.1, "outer_optimizer": "adam:0.05",
}  # fmt: skip
_EXACT: dict[str, Setting] = {
    "local_steps": 1, "inner_lr": 0.15, "hessian_lr": 0.15, "outer_lr": 0.05, "truncation": "full",
}  # fmt: skip


def checked(name: str) -> tuple[Algorithm, Algorithm | None]:
    """An algorithm as the conformance suite runs it: with every option at work, and set to be exact (None if it cannot)."""
    kind = ALGORITHMS[name]
    busy, exact = kind.about.busy, kind.about.exact
    return _made(kind, _BUSY, busy), None if exact is None else _made(kind, _EXACT, exact)


def _made(kind: type[Algorithm], usual: Mapping[str, Setting], own: Mapping[str, Setting]) -> Algorithm:
    """An instance with its own settings, and those of the usual ones that it has a field for."""
    fields = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in usual.items() if name in fields}, **own)
