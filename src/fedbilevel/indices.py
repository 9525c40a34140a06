"""Indices that lie outside their array, which XLA clamps (reading) or drops (writing) without a word.

A function's traced program is computed operation by operation; every gather, scatter and dynamic slice has its indices
compared with the array that it reads or writes. Calls and scans are looked into; a `while_loop` is computed as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .jaxprs import Jaxpr, JaxprEqn, Literal, Var

Values = list[ArrayLike]
Beyond = list[tuple[int, int]]  # an index, and the size of the axis outside which it lies

_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_SEEN_THROUGH = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "checkpoint",
    "remat2",
)


def outside(function: Callable[..., PyTree], *args: PyTree) -> Beyond:
    """(index, size of its axis) of each index that function(*args) uses outside its array.

    A negative index counts from the end, as in numpy, and is outside below -size.
    """
    program = jax.make_jaxpr(function)(*args)
    if not _indexes(program.jaxpr):
        return []
    found: Beyond = []
    _run(program.jaxpr, program.consts, jax.tree.leaves(args), found)
    return found


def _run(program: Jaxpr, consts: Values, args: Values, found: Beyond) -> Values:
    values: dict[Var, ArrayLike] = {}
    read = lambda v: v.val if isinstance(v, Literal) else values[v]
    values.update(zip(program.constvars, consts, strict=True))
    values.update(zip(program.invars, args, strict=True))
    for eqn in program.eqns:
        given = [read(v) for v in eqn.invars]
        found += _outside(eqn, given)
        values.update(zip(eqn.outvars, _compute(eqn, given, found), strict=True))
    return [read(v) for v in program.outvars]


def _compute(eqn: JaxprEqn, given: Values, found: Beyond) -> Values:
    name, params = eqn.primitive.name, eqn.params
    if any(map(_indexes, _inner(eqn))):
        if name in _SEEN_THROUGH:
            inner = next(params[key] for key in _CALLS if key in params)
            return _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", []), given, found)
        if name == "cond":
            branch = params["branches"][int(np.asarray(given[0]))]
            return _run(branch.jaxpr, branch.consts, given[1:], found)
        if name == "scan":
            return _scan(eqn, given, found)
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*given, **eqn.primitive.get_bind_params(params))
    return list(out) if eqn.primitive.multiple_results else [out]


def _scan(eqn: JaxprEqn, given: Values, found: Beyond) -> Values:
    params = eqn.params
    fixed, carried = params["num_consts"], params["num_consts"] + params["num_carry"]
    consts, carry, each = given[:fixed], given[fixed:carried], given[carried:]
    body, turns = params["jaxpr"], range(params["length"])
    rows = []
    for turn in reversed(turns) if params["reverse"] else turns:
        out = _run(
            body.jaxpr, body.consts, [*consts, *carry, *jax.tree.map(lambda leaf, turn=turn: leaf[turn], each)], found
        )
        carry = out[: len(carry)]
        rows.append(out[len(carry) :])
    rows = rows[::-1] if params["reverse"] else rows
    return [*carry, *(jax.numpy.stack(column) for column in zip(*rows, strict=True))]


def _inner(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The programs within an operation."""
    for value in eqn.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield inner


def _indexes(program: Jaxpr) -> bool:
    """Whether anything in a program uses indices."""
    return any(
        eqn.primitive.name in ("gather", "dynamic_slice", "dynamic_update_slice")
        or eqn.primitive.name.startswith("scatter")
        or any(map(_indexes, _inner(eqn)))
        for eqn in program.eqns
    )


def _outside(eqn: JaxprEqn, given: Values) -> Beyond:
    """The indices of one operation that lie outside."""
    name, params = eqn.primitive.name, eqn.params
    if name == "gather":
        axes, sizes = params["dimension_numbers"].start_index_map, params["slice_sizes"]
        return _beyond(np.asarray(given[1]), [(np.shape(given[0])[a], sizes[a]) for a in axes])
    if name.startswith("scatter"):
        numbers, shape = params["dimension_numbers"], np.shape(given[0])
        apart = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
        windows = [np.shape(given[2])[a] for a in numbers.update_window_dims]
        width = dict(zip([a for a in range(len(shape)) if a not in apart], windows, strict=True))
        axes = numbers.scatter_dims_to_operand_dims
        return _beyond(np.asarray(given[1]), [(shape[a], width.get(a, 1)) for a in axes])
    if name in ("dynamic_slice", "dynamic_update_slice"):
        reads = name == "dynamic_slice"
        starts, sizes = given[1 if reads else 2 :], params["slice_sizes"] if reads else np.shape(given[1])
        place = np.stack([np.asarray(start) for start in starts], axis=-1) if starts else np.zeros((0, 0))
        return _beyond(place, list(zip(np.shape(given[0]), sizes, strict=True)))
    return []


def _beyond(indices: np.ndarray, axes: list[tuple[int, int]]) -> Beyond:
    """indices (..., axes), for each axis its size and that of the window that is read or written there."""
    found = []
    for place, (size, window) in enumerate(axes):
        column = indices[..., place].ravel().astype(np.int64)
        for index in dict.fromkeys(column[(column < 0) | (column > size - window)].tolist()):
            found.append(
                (index - size if index < 0 else index + window - 1, size)
            )  # jax adds the size to negative ones
    return found
