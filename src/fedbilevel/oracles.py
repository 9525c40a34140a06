"""A problem whose oracles are traced once each, wherever and however often a program asks them."""

from __future__ import annotations

import copy
import functools
import inspect

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from . import owned
from .blocks import Window
from .compiled import sharable, traced
from .data import FederatedData
from .problem import ORACLES, Problem, blocks_of, in_blocks

_NAMES = (*ORACLES, "row_features", "means")
_LOSSES = ("inner", "outer", "features", "outer_means", "outer_of")


def traced_once(problem: Problem) -> Problem:
    """The same problem, each oracle of which is traced once at given shapes; as it is where it cannot be.

    An iteration asks the same oracle at several places: in loops, in rounds, and in the programs that it is part of.
    """
    if not sharable(problem):
        return problem
    shared = copy.copy(problem)
    for name in _NAMES:
        object.__setattr__(shared, name, functools.partial(_asked, problem, name))
    object.__setattr__(shared, "_whole", problem)
    return shared


def around(problem: Problem, means: PyTree) -> Problem:
    """The same problem, whose F of means is taken linearly around these; each oracle traced once where it was before."""
    whole = problem.__dict__.get("_whole")
    return problem.at_means(means) if whole is None else traced_once(whole.at_means(means))


def around_all(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> Problem:
    """The problem with F of means taken linearly around those of all clients at (x, y); as it is where f is a mean itself.

    For looks at single clients, whose own means may have no group in their denominators.
    """
    if problem.outer_means is None:
        return problem
    many = data.clients
    p = jnp.full((many,), 1 / many) if data.weights is None else jnp.asarray(data.weights)

    def add(i: Int[Array, ""], total: PyTree) -> PyTree:
        own = problem.means(owned.own(x, i), owned.own(y, i), data.outer.client(i).all())
        return jax.tree.map(lambda all, leaf: all + p[i].astype(leaf.dtype) * leaf, total, own)

    like = jax.eval_shape(lambda: problem.means(owned.own(x, 0), owned.own(y, 0), data.outer.client(0).all()))
    none = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    return around(problem, jax.lax.fori_loop(0, many, add, none))


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
    shared, bare = copy.copy(problem), problem.at_means(None)  # the losses need none, and hold no arrays of a trace
    for name in _LOSSES:
        if getattr(problem, name) is not None:
            object.__setattr__(shared, name, functools.partial(_valued, bare, name))
    return shared


def _valued(problem: Problem, name: str, *args: PyTree) -> PyTree:
    return traced(_loss, problem, None, name, *args)


def _loss(problem: Problem, _: None, name: str, *args: PyTree) -> PyTree:
    return getattr(problem, name)(*args)
