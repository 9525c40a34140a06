"""Which leaves of x and y a loss depends on, found in its traced program and not by trying numbers.

A leaf has influence if the derivative of the loss in it is not zero by construction. Leaves that the loss never reads,
that it reads through `jax.lax.stop_gradient` alone, or as whole numbers alone, have none. A derivative that happens to
be zero at some point (a ReLU that is off) is an influence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .jaxprs import ClosedJaxpr, Jaxpr, dce_jaxpr, jaxpr_as_fun
from .jaxprs import Literal as Constant
from .owned import nodes, own
from .problem import Problem, Rows

Level = Literal["inner", "outer"]
Variable = Literal["x", "y"]


def influence(problem: Problem, level: Level, variable: Variable, x: PyTree, y: PyTree, rows: Rows) -> PyTree:
    """A tree of booleans like x or y: whether the loss of a level depends on each leaf of it.

    Args:
        x, y: pytrees of floating-point arrays (or their shapes) alone, as `trainable` returns them.
        rows: of one client, at that level; only their shapes count.
    """
    if any(not node.own for node in nodes((x, y))):  # one client's
        found = influence(problem, level, variable, own(x, 0), own(y, 0), rows)
        return jax.tree.unflatten(jax.tree.structure({"x": x, "y": y}[variable]), jax.tree.leaves(found))
    if _oracles_of_its_own(problem, level):
        like = {"x": x, "y": y}[variable]
        known = problem.depends(level, variable)
        if known is not None:
            return jax.tree.unflatten(jax.tree.structure(like), known)
        leaves = _not_constant(_gradient(problem, level, variable), (x, y, rows))
        return jax.tree.unflatten(jax.tree.structure(like), leaves)
    loss = getattr(problem, f"{level}_value")
    along_x = variable == "x"

    def derivative(x: PyTree, y: PyTree, rows: Rows, direction: PyTree) -> Float[Array, ""]:
        of = (lambda x: loss(x, y, rows)) if along_x else (lambda y: loss(x, y, rows))
        at = x if along_x else y
        return jax.jvp(of, (at,), (direction,))[1]

    like = x if along_x else y
    program = jax.make_jaxpr(derivative)(x, y, rows, like).jaxpr
    used = dce_jaxpr(program, [True])[1]
    structure = jax.tree.structure(like)
    return jax.tree.unflatten(structure, used[len(used) - structure.num_leaves :])


def compared(problem: Problem, level: Level, variable: Variable, x: PyTree, y: PyTree, rows: Rows) -> bool:
    """Whether the loss reads a variable without influence all the same: in comparisons, or as whole numbers.

    Its value then depends on the variable, and its derivative is zero wherever there is one. What is read through
    `jax.lax.stop_gradient` was meant to be a constant, and does not count.
    """
    if _oracles_of_its_own(problem, level):
        return False
    x, y = own((x, y), 0)
    loss = getattr(problem, f"{level}_value")
    program = jax.make_jaxpr(loss)(x, y, rows).jaxpr
    used, first = dce_jaxpr(program, [True])[1], len(jax.tree.leaves(x))
    place = slice(first) if variable == "x" else slice(first, first + len(jax.tree.leaves(y)))
    return any(used[place]) and "stop_gradient" not in _primitives(program)


def _primitives(program: Jaxpr) -> set[str]:
    """The names of what a traced program does, nested programs included."""
    found = set()
    for eqn in program.eqns:
        found.add(eqn.primitive.name)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            nested = getattr(value, "jaxpr", value)
            found |= _primitives(nested) if hasattr(nested, "eqns") else set()
    return found


def named(tree: PyTree, name: str, value: bool = False) -> list[str]:
    """The leaves of a tree of booleans that are `value`, as `y['w']`."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [f"{name}{jax.tree_util.keystr(path)}" for path, leaf in paths if leaf is value]


def _oracles_of_its_own(problem: Problem, level: Level) -> bool:
    """Whether the loss is not what is differentiated: then the gradients that it brings are looked at."""
    names = {
        "inner": ("inner_value", "inner_gradient", "inner_gradient_x"),
        "outer": ("outer_value", "outer_gradients"),
    }
    return any(getattr(type(problem), name) is not getattr(Problem, name) for name in names[level])


def _gradient(problem: Problem, level: Level, variable: Variable) -> Callable[..., PyTree]:
    if level == "inner":
        return problem.inner_gradient if variable == "y" else problem.inner_gradient_x
    return lambda *given: problem.outer_gradients(*given)["xy".index(variable)]


def _not_constant(function: Callable[..., PyTree], given: tuple) -> list[bool]:
    """Of each array that a function returns: whether it is anything else than zeros, whatever the function is given."""
    whole = jax.make_jaxpr(function)(*given)

    def moves(place: int) -> bool:
        program, used = dce_jaxpr(whole.jaxpr, [i == place for i in range(len(whole.out_avals))])
        read = [v for eqn in program.eqns for v in eqn.invars if not isinstance(v, Constant)]
        if any(used) or any(v in program.constvars for v in (*read, *program.outvars) if not isinstance(v, Constant)):
            return True
        with jax.ensure_compile_time_eval():
            closed = ClosedJaxpr(program, whole.consts)
            return any(bool(jnp.any(out != 0)) for out in jaxpr_as_fun(closed)())

    return [moves(place) for place in range(len(whole.out_avals))]
