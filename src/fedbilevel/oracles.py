"""A problem whose oracles are traced once each, wherever and however often a program asks them."""

from __future__ import annotations

import copy
import functools
import inspect

from jaxtyping import PyTree

from .blocks import Window
from .compiled import sharable, traced
from .problem import ORACLES, Problem, blocks_of, in_blocks

_NAMES = (*ORACLES, "row_features")
_LOSSES = ("inner", "outer", "features")


def traced_once(problem: Problem) -> Problem:
    """The same problem, each oracle of which is traced once at given shapes; as it is where it cannot be.

    An iteration asks the same oracle at several places: in loops, in rounds, and in the programs that it is part of.
    """
    if not sharable(problem):
        return problem
    shared = copy.copy(problem)
    for name in _NAMES:
        object.__setattr__(shared, name, functools.partial(_asked, problem, name))
    return shared


def _asked(problem: Problem, name: str, *args: PyTree, **named: PyTree) -> PyTree:
    args = inspect.signature(getattr(problem, name)).bind(*args, **named).args
    return traced(_oracle, problem, None, name, tuple(map(blocks_of, args)), *args)


def _oracle(problem: Problem, _: None, name: str, windows: tuple[Window | None, ...], *args: PyTree) -> PyTree:
    given = [arg if window is None else in_blocks(arg, window) for arg, window in zip(args, windows, strict=True)]
    return getattr(losses_traced_once(problem), name)(*given)


def losses_traced_once(problem: Problem) -> Problem:
    """The same problem, each loss of which is traced once: batches and derivatives of it are made of that trace."""
    if not sharable(problem):
        return problem
    shared = copy.copy(problem)
    for name in _LOSSES:
        if getattr(problem, name) is not None:
            object.__setattr__(shared, name, functools.partial(_valued, problem, name))
    return shared


def _valued(problem: Problem, name: str, *args: PyTree) -> PyTree:
    return traced(_loss, problem, None, name, *args)


def _loss(problem: Problem, _: None, name: str, *args: PyTree) -> PyTree:
    return getattr(problem, name)(*args)
