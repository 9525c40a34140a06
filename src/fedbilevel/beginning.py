"""Where a run begins: an algorithm's first states, each computed as one program instead of operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from . import owned
from .algorithm import Algorithm
from .arrays import Concrete
from .canonical import trace
from .compiled import Kept
from .jaxprs import ClosedJaxpr, JaxprEqn, Literal, ShapedArray, dce_jaxpr, jaxpr_as_fun
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
    """What one client keeps, at the start; all begin alike, but for blocks of x and y that are theirs."""
    return _at_once(client_state, algorithm, state)


def client_state(algorithm: Algorithm, state: PyTree) -> PyTree:
    """As `first_client_state`, within a program."""
    x, y = owned.own((state.x, state.y), 0)
    return strong(jax.tree.map(jnp.asarray, algorithm.client_init(x, y)))


def _init(algorithm: Algorithm, x: PyTree, y: PyTree) -> PyTree:
    return algorithm.init(x, y)


def _at_once(function: Callable[..., PyTree], algorithm: Algorithm, *args: PyTree) -> PyTree:
    arrays, rest = eqx.partition((as_leaves(algorithm), *args), eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)
    static, places = jax.tree.flatten(rest)
    shapes = tuple((leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in leaves)
    wide = jax.config.jax_enable_x64, jax.config.jax_numpy_dtype_promotion  # pyright: ignore[reportAttributeAccessIssue]
    key = function, class_of(algorithm), structure, tuple(static), places, shapes, wide
    whole = lambda leaves: function(*eqx.combine(jax.tree.unflatten(structure, leaves), rest))
    try:
        program = _PROGRAMS.get(key, lambda: _program(whole, leaves))
    except Exception:  # while it is traced: an algorithm may ask Python to decide on values, which are at hand here
        return function(algorithm, *args)
    return program(leaves)


def _program(function: Callable[..., PyTree], leaves: list[Concrete]) -> Callable[[list[Concrete]], PyTree]:
    """A function of arrays as one program; by numpy, where all it does is to fill arrays with numbers: as most do."""
    traced = trace(function, leaves)
    outs, structure = jax.tree.flatten(traced.out)
    jaxpr, _ = dce_jaxpr(traced.jaxpr.jaxpr, [True] * len(traced.jaxpr.jaxpr.outvars), instantiate=True)
    whole = ClosedJaxpr(jaxpr, traced.jaxpr.consts)
    plain = all(equation.primitive.name in _FILLS and not _of_keys(equation) for equation in jaxpr.eqns)
    plain = plain and not any(getattr(var.aval, "weak_type", False) for var in jaxpr.outvars)
    compiled = jax.jit(jaxpr_as_fun(whole))

    def program(leaves: list[Concrete]) -> PyTree:
        found = iter(_filled(whole, leaves) if plain else compiled(*leaves))
        given = [next(found) if isinstance(out, jax.ShapeDtypeStruct) else out for out in outs]
        return jax.tree.unflatten(structure, given)

    return program


def _filled(whole: ClosedJaxpr, leaves: list[Concrete]) -> list[Concrete]:
    jaxpr = whole.jaxpr
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*whole.consts, *leaves), strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]
    for equation in jaxpr.eqns:
        (out,) = equation.outvars
        values[out] = _FILLS[equation.primitive.name](np.asarray(read(equation.invars[0])), equation.params, out.aval)
    given = [*jaxpr.invars, *jaxpr.constvars]
    made = lambda atom: read(atom) if atom in given else np.asarray(read(atom), atom.aval.dtype)
    return [jax.device_put(made(atom)) for atom in jaxpr.outvars]


def _of_keys(equation: JaxprEqn) -> bool:
    """Whether random keys are filled in, of which numpy knows nothing."""
    made = [var.aval for var in equation.outvars]
    return any(isinstance(one, ShapedArray) and jnp.issubdtype(one.dtype, jax.dtypes.extended) for one in made)


def _broadcast(array: np.ndarray, params: Mapping[str, Any], like: ShapedArray) -> np.ndarray:
    shape = [1] * len(like.shape)
    for place, size in zip(params["broadcast_dimensions"], array.shape, strict=True):
        shape[place] = size
    return np.broadcast_to(array.astype(like.dtype).reshape(shape), like.shape)


_FILLS = {"broadcast_in_dim": _broadcast, "convert_element_type": lambda array, _, like: array.astype(like.dtype)}
