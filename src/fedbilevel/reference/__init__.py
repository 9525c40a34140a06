"""Centralised references: the lower-level solution and the hypergradient, from the rows of all clients at once.

    f = sum_i p_i f_i,   g = sum_i p_i g_i,   y*(x) = argmin_y g(x, y),   Phi(x) = f(x, y*(x))
    grad Phi(x) = d_x f - J H^{-1} d_y f   at (x, y*(x)),   H = d2_yy g,   J = d2_xy g

H, J and the gradients are averaged over clients BEFORE they are composed; the mean of the clients' own hypergradients
is another, biased quantity. Nothing here is federated or counted in rounds: these are yardsticks for estimators and
runs. Losses are reached through the oracles of `Problem` alone, which need no derivatives of their own. Everything is
compiled once for each problem, shapes and method, and checks the error of its result before it is returned; x and y are
any pytrees with floating-point arrays (equinox modules too), and their other leaves stay as they are. Half precision
(float16, bfloat16) is computed in float32, rows included, and returned in its own dtype.

Sources: implicit differentiation by conjugate gradients, Pedregosa (ICML 2016); by the Neumann series, Lorraine et al.
(AISTATS 2020); unrolled ("iterative") differentiation, Franceschi et al. (ICML 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from ..compiled import Kept, run
from ..data import FederatedData, check_whole
from ..errors import check, unknown_name, warn
from ..foreign import as_given
from ..influence import Level, influence, named
from ..owned import check_clients
from ..problem import Problem, bind
from ..program import compiled_as, freeze
from ..variables import trainable
from .judge import check_hypergradient, check_solved, narrowed, warn_if_indefinite
from .linear import NEUMANN_TERMS as NEUMANN_TERMS
from .linear import norm
from .lower import Lower as _Lower

METHODS = ("exact", "cg", "neumann", "unrolled")
DENSE_LIMIT = 1_000  # up to this dim(y) the dense Hessian is used where no method is asked for
UNROLLED_TERMS = 1_000  # the gradient steps of "unrolled" that was given no number

Scalar = Float[Array, ""]


def outer_value(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> Scalar:
    """f(x, y), the upper-level loss over all clients, at the given y."""
    return _value(problem, data, x, y, "outer")


def outer_means(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> PyTree:
    """M(x, y), the means over all clients of which the upper level is made, at the given y: like what `outer_means` returns.

    Raises:
        InputError: the outer loss is a mean itself; or as `solution`.
    """
    check(
        problem.outer_means is not None,
        "the outer loss is a mean itself: outer_value(problem, data, x, y) is all of it.",
    )
    return _run(_Lower.means, *_enter(problem, data, x, y))


def inner_value(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> Scalar:
    """g(x, y), the lower-level loss over all clients, at the given y."""
    return _value(problem, data, x, y, "inner")


def value(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> Scalar:
    """Phi(x) = f(x, y*(x)); y is template and start. Raises as `solution`."""
    wide, data_wide, x_wide, start = _enter(problem, data, x, y)
    out = _run(_Lower.value, wide, data_wide, x_wide, _solution(wide, data_wide, x_wide, start), "outer")
    return narrowed(out, _like_value(out, problem, data, x, y, "outer"), "Phi")


def hessian(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> Float[Array, "dim_y dim_y"]:
    """H = d2_yy g(x, y) at the given y, dense, in the order of `jax.flatten_util.ravel_pytree(y)`."""
    like = ravel_pytree(trainable(y, "y")[0])[0]
    return narrowed(_run(_Lower.hessian, *_enter(problem, data, x, y)), like, "the Hessian")


def solution(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> PyTree:
    """y*(x), like y: the lower-level model trained on all rows, from the start y, down to rounding errors.

    Leaves of y on which the inner loss does not depend (frozen by `jax.lax.stop_gradient`, say) stay at their start, and
    a warning names them. L-BFGS with a line search (optimistix) comes near; damped Newton steps finish, with the dense
    Hessian up to dim(y) = `DENSE_LIMIT` and by conjugate gradients beyond.

    Raises:
        InputError: x or y cannot be used, or a loss does not return a floating-point scalar.
        RunError: no minimiser was reached, or g is not strongly convex there; in 32 bits also where the largest
            curvature is more than 1e5 times the smallest, for rounding errors then are 1 % of y*.
    """
    like, rest = trainable(y, "y")
    return as_given(eqx.combine(narrowed(_solution(*_enter(problem, data, x, y)), like, "y*"), rest), rest)


def stationarity(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> Scalar:
    """|grad Phi(x)|^2 at y*(x), by "exact" up to dim(y) = `DENSE_LIMIT` and "cg" beyond. Raises as `hypergradient`."""
    size = ravel_pytree(trainable(y, "y")[0])[0].size
    method = "exact" if size <= DENSE_LIMIT else "cg"
    like = ravel_pytree(trainable(x, "x")[0])[0]
    h = _hypergradient(*_enter(problem, data, x, y), method)
    return narrowed(norm(h) ** 2, like, "|grad Phi|^2")


def hypergradient(
    problem: Problem,
    data: FederatedData,
    x: PyTree,
    y: PyTree,
    method: Literal["exact", "cg", "neumann", "unrolled"] = "exact",
    terms: int | None = None,
    step: float | None = None,
    solve_inner: bool = True,
) -> PyTree:
    """grad Phi(x) at y*(x), like x; None for leaves of x that are not floating-point arrays, as in `eqx.filter_grad`.

    Args:
        y: template, and start of the lower-level solve.
        method: how v* = H^{-1} d_y f is found: "exact", a linear solve with the dense (dim y, dim y) Hessian; "cg",
            conjugate gradients; "neumann", step * sum_{k < terms} (I - step H)^k d_y f, which is off by at most
            (1 - step mu)^terms |v*|. "unrolled" differentiates f(x, y_K(x)) through K = terms gradient steps from y
            instead, in reverse mode: y is not solved for first, and memory holds terms copies of it.
        terms: None: as many as it takes, at most `NEUMANN_TERMS`; for "unrolled" `UNROLLED_TERMS`, which must do.
        step: below 2 / L, L the largest eigenvalue of H. None: 1 / L, at y*(x) or at the start of "unrolled".
        solve_inner: False evaluates the formula at the given y instead of y*(x).

    Raises:
        InputError: as `solution`; an unknown method; terms or step that are not positive or that it does not take.
        RunError: as `solution`; or the linear solve, the series or the gradient steps did not converge: the error of
            the result, which is measured and not taken from the residual, is above 6e-7 in float64, 2e-3 in float32, of
            the two parts that it is made of. With terms= a truncated result is what was asked for.

    Warns, where solve_inner=False, if H is not positive semidefinite at the given y.
    """
    if method not in METHODS:
        raise unknown_name("hypergradient method", method, METHODS)
    series = method in ("neumann", "unrolled")
    check(series or terms is step is None, f"terms= and step= belong to 'neumann' and 'unrolled', not to {method!r}.")
    check(terms is None or (isinstance(terms, int) and terms > 0), f"terms= is a positive whole number; got {terms!r}.")
    check(step is None or 0 < step < math.inf, f"step= is a positive number, below 2 / L; got {step!r}.")
    like, rest = trainable(x, "x")
    h = _hypergradient(*_enter(problem, data, x, y), method, terms, step, solve_inner)
    return as_given(narrowed(h, like, "the hypergradient"), rest)


def _hypergradient(
    problem: Problem,
    data: FederatedData,
    x: PyTree,
    y: PyTree,
    method: str,
    terms: int | None = None,
    step: float | None = None,
    solve_inner: bool = True,
) -> PyTree:
    size = None if step is None else jnp.asarray(step, jax.tree.leaves(y)[0].dtype)
    if method == "unrolled":
        given = terms or UNROLLED_TERMS, size, terms is None
        (h, evidence), still = _run_moving(_Lower.unrolled, problem, data, x, y, *given)
        _warn_of(still)
    else:
        extremes, count = None, None if terms is None else jnp.asarray(terms, jnp.int32)
        if solve_inner:
            y, *extremes = _solve(problem, data, x, y)
        (h, evidence), still = _run_moving(_Lower.implicit, problem, data, x, y, method, count, size, extremes)
        if not solve_inner:
            _warn_of(still)
    check_hypergradient(method, evidence, terms)
    if method != "unrolled" and not solve_inner:
        warn_if_indefinite(evidence["smallest"], evidence["largest"])
    return h


def _enter(
    problem: Problem, data: FederatedData, x: PyTree, y: PyTree
) -> tuple[Problem, FederatedData, PyTree, PyTree]:
    """What `_run` takes: the problem over the floating-point arrays of x and y, which are checked.

    Half precision is computed in 32 bits.
    """
    check_whole(data, "fedbilevel.reference")
    (x, x_rest), (y, y_rest) = trainable(x, "x"), trainable(y, "y")
    for name, variable in (("x", x), ("y", y)):
        check_clients(variable, name, data.clients)
    if any(map(_half, jax.tree.leaves((x, y)))):
        x, y, data = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if _half(leaf) else leaf, (x, y, data))
    return freeze(bind(problem, x_rest, y_rest), x, y, data), data, x, y


def _half(leaf: Array | np.ndarray) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32


def _value(problem: Problem, data: FederatedData, x: PyTree, y: PyTree, level: Level) -> Scalar:
    out = _run(_Lower.value, *_enter(problem, data, x, y), level)
    return narrowed(out, _like_value(out, problem, data, x, y, level), f"the {level} loss")


def _like_value(
    out: Scalar, problem: Problem, data: FederatedData, x: PyTree, y: PyTree, level: Level
) -> Scalar | jax.ShapeDtypeStruct:
    """A scalar in the dtype that a loss has without `_enter`; the widest of x and y, where they do not go with the rows."""
    (x, x_rest), (y, y_rest) = trainable(x, "x"), trainable(y, "y")
    if not any(map(_half, jax.tree.leaves((x, y)))):
        return out
    value = getattr(bind(problem, x_rest, y_rest), f"{level}_value")
    try:
        return eqx.filter_eval_shape(value, x, y, getattr(data, level).client(0).all())
    except Exception:  # whatever the loss raises in the precision that it was not computed in
        leaves = jax.tree.leaves((x, y))
        return jnp.zeros((), max((leaf.dtype for leaf in leaves), key=lambda dtype: jnp.finfo(dtype).bits))


def _run(
    method: Callable[..., PyTree], problem: Problem, data: FederatedData, x: PyTree, y: PyTree, *args: PyTree
) -> PyTree:
    """A method of `_Lower`, compiled."""
    everything = jax.tree.map(lambda _: True, y)
    return run(_at, problem, None, method, everything, DENSE_LIMIT, data, x, y, *args)


def _run_moving(
    method: Callable[..., PyTree], problem: Problem, data: FederatedData, x: PyTree, y: PyTree, *args: PyTree
) -> tuple[PyTree, list[str]]:
    """(A method of `_Lower` over the leaves of y that the inner loss depends on, compiled; the names of the others)."""
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((x, y)))
    depends = _INFLUENCE.get(
        (compiled_as(problem), jax.tree.structure(data), shapes),
        lambda: influence(problem, "inner", "y", x, y, data.inner.client(0).all()),
    )
    check(any(jax.tree.leaves(depends)), "the inner loss does not depend on y: there is nothing to solve for.")
    return run(_at, problem, None, method, depends, DENSE_LIMIT, data, x, y, *args), named(depends, "y")


_INFLUENCE = Kept(64)


def _at(
    problem: Problem,
    _: None,
    method: Callable[..., PyTree],
    depends: PyTree,
    limit: int,
    data: FederatedData,
    x: PyTree,
    y: PyTree,
    *args: PyTree,
) -> PyTree:
    moving, still = eqx.partition(y, depends)
    flat, unravel = ravel_pytree(moving)
    return method(_Lower(problem, data, x, still, unravel, flat.size <= limit), flat, *args)


def _solve(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> tuple[PyTree, Scalar, Scalar]:
    """(y*, the smallest and the largest curvature there)."""
    (y, reached, gradient, smallest, largest), still = _run_moving(_Lower.solution, problem, data, x, y)
    _warn_of(still)
    check_solved(reached, gradient, smallest, largest)
    return y, smallest, largest


def _solution(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> PyTree:
    return _solve(problem, data, x, y)[0]


def _warn_of(still: list[str]) -> None:
    if still:
        one = len(still) == 1
        warn(
            f"the inner loss does not depend on {', '.join(still)}: {'it is' if one else 'they are'} left at the start, and "
            f"the hypergradient is that of the rest; leave {'it' if one else 'them'} out of y if that is not meant."
        )
