"""Where a run begins: an algorithm's first states, each computed as one program instead of operation by operation."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .algorithm import Algorithm
from .compiled import Kept
from .problem import strong
from .program import class_of

_PROGRAMS: Kept[Callable[..., PyTree]] = Kept(64)


def as_leaves(algorithm: Algorithm) -> Algorithm:
    """The algorithm with its Python numbers as (weakly typed) arrays, so that compiled code takes them as arguments."""
    weak = jax.device_put  # as `jnp.asarray` does, but it compiles nothing
    return jax.tree.map(lambda leaf: weak(leaf) if isinstance(leaf, (int, float)) else leaf, algorithm)


def first_state(algorithm: Algorithm, x: PyTree, y: PyTree) -> PyTree:
    """`algorithm.init(x, y)`, the server's state."""
    return _at_once(_init, algorithm, x, y)


def first_client_state(algorithm: Algorithm, state: PyTree) -> PyTree:
    """What one client keeps, at the start."""
    return _at_once(client_state, algorithm, state)


def client_state(algorithm: Algorithm, state: PyTree) -> PyTree:
    """As `first_client_state`, within a program."""
    return strong(jax.tree.map(jnp.asarray, algorithm.client_init(state.x, state.y)))


def _init(algorithm: Algorithm, x: PyTree, y: PyTree) -> PyTree:
    return algorithm.init(x, y)


def _at_once(function: Callable[..., PyTree], algorithm: Algorithm, *args: PyTree) -> PyTree:
    program = _PROGRAMS.get((function, class_of(algorithm)), lambda: eqx.filter_jit(_fresh(function)))
    try:
        return program(as_leaves(algorithm), *args)
    except Exception:  # an algorithm may ask Python to decide on values, which are at hand here
        return function(algorithm, *args)


def _fresh(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Another function that does the same: JAX knows what it has compiled by the function."""
    return lambda *args: function(*args)
