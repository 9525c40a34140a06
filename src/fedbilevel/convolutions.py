"""Convolutions as products of matrices, for programs that loop on processors.

XLA's compiler for CPUs (jaxlib 0.10.2) has a fast convolution, which it takes for gradients outside of loops alone: within
one, as all iterations of a run are, they take ten times as long. As patches times weights they do not, with weights of each
client either (`benchmarks/convolutions.py`). The numbers are the same but for rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree, Shaped

from .jaxprs import Jaxpr, JaxprEqn, Literal, Var, bound

ROOM = 2**18  # numbers in the patches of one row, up to which they are made: they are kept for a derivative
_WINDOW = 64  # places of a window
_NESTED = ("jit", "pjit")  # what is looked into; rules of one's own, loops and branches stay as they are

Numbers = Shaped[Array, "..."]


def convolves(jaxpr: Jaxpr) -> bool:
    """Whether a traced program has a convolution that `ByProducts` would replace."""
    return any(_replaced(eqn) or ((nested := _nested(eqn)) is not None and convolves(nested)) for eqn in jaxpr.eqns)


class ByProducts(eqx.Module):
    """The same function, in which convolutions are products of matrices."""

    function: Callable[..., PyTree]

    def __call__(self, *args: PyTree) -> PyTree:
        closed, shape = jax.make_jaxpr(self.function, return_shape=True)(*args)
        leaves = _evaluated(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), leaves)


def _evaluated(jaxpr: Jaxpr, consts: Sequence[ArrayLike], args: Sequence[ArrayLike]) -> list[ArrayLike]:
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    value = lambda of: of.val if isinstance(of, Literal) else known[of]
    for eqn in jaxpr.eqns:
        given = [value(of) for of in eqn.invars]
        nested = _nested(eqn)
        if _replaced(eqn):
            found = [_convolved(*given, **eqn.params)]
        elif nested is not None and convolves(nested):
            found = _evaluated(nested, eqn.params["jaxpr"].consts, given)
        else:
            found = bound(jaxpr, eqn, given)
        known.update(zip(eqn.outvars, found, strict=True))
    return [value(of) for of in jaxpr.outvars]


def _nested(eqn: JaxprEqn) -> Jaxpr | None:
    return eqn.params["jaxpr"].jaxpr if eqn.primitive.name in _NESTED else None


def _replaced(eqn: JaxprEqn) -> bool:
    """Whether it is a convolution in one group, of little padding between its rows, with patches that have room."""
    if eqn.primitive.name != "conv_general_dilated":
        return False
    params, out = eqn.params, _shape(eqn.outvars[0])
    numbers = params["dimension_numbers"]
    weights = [_shape(eqn.invars[1])[axis] for axis in numbers.rhs_spec]
    places = math.prod(weights[2:])
    each = places * weights[1] * math.prod(out[axis] for axis in numbers.out_spec[2:])
    groups = params["feature_group_count"] * params["batch_group_count"]
    plain = groups == 1 and set(params["lhs_dilation"]) <= {1}
    return plain and 0 < places <= _WINDOW and each <= ROOM and 0 not in out


def _shape(of: Var | Literal) -> tuple[int, ...]:
    return tuple(getattr(of.aval, "shape"))  # noqa: B009  JAX does not say that arrays are all there is


def _convolved(
    rows: ArrayLike, weights: ArrayLike, *, dimension_numbers: jax.lax.ConvDimensionNumbers,
    window_strides: Sequence[int], padding: Sequence[tuple[int, int]],
    rhs_dilation: Sequence[int], precision: PyTree, preferred_element_type: PyTree, **_: PyTree,
) -> Numbers:  # fmt: skip
    first, last = dimension_numbers.lhs_spec, dimension_numbers.rhs_spec
    rows, weights = jnp.asarray(rows), jnp.asarray(weights)
    rows = rows.transpose(first[0], *first[2:], first[1])  # (rows, places..., channels)
    weights = weights.transpose(*last[2:], last[1], last[0])  # (window..., channels, channels out)
    zero = jnp.zeros((), rows.dtype)
    rows = jax.lax.pad(rows, zero, [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)])
    window = weights.shape[:-2]
    reach = [(size - 1) * gap for size, gap in zip(window, rhs_dilation, strict=True)]
    many = [
        (length - far - 1) // stride + 1
        for length, far, stride in zip(rows.shape[1:-1], reach, window_strides, strict=True)
    ]

    def patch(place: tuple[int, ...]) -> Numbers:
        begin = [at * gap for at, gap in zip(place, rhs_dilation, strict=True)]
        end = [at + (n - 1) * stride + 1 for at, n, stride in zip(begin, many, window_strides, strict=True)]
        start, limit = (0, *begin, 0), (rows.shape[0], *end, rows.shape[-1])
        return jax.lax.slice(rows, start, limit, (1, *window_strides, 1))

    patches = jnp.stack([patch(place) for place in itertools.product(*map(range, window))], axis=-2)
    flat = patches.reshape(*patches.shape[:-2], -1)
    out = jax.lax.dot_general(
        flat, weights.reshape(-1, weights.shape[-1]), (((flat.ndim - 1,), (0,)), ((), ())),
        precision=precision, preferred_element_type=preferred_element_type,
    )  # fmt: skip
    order = dimension_numbers.out_spec  # where (row, channel, places...) go
    back = [0] * out.ndim
    for axis, source in zip(order, (0, out.ndim - 1, *range(1, out.ndim - 1)), strict=True):
        back[axis] = source
    return out.transpose(back)
