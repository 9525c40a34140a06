"""Centralised references: the lower-level solution and the hypergradient, from the rows of all clients at once.

    f = sum_i p_i f_i,   g = sum_i p_i g_i,   y*(x) = argmin_y g(x, y),   Phi(x) = f(x, y*(x))
    grad Phi(x) = d_x f - J H^{-1} d_y f   at (x, y*(x)),   H = d2_yy g,   J = d2_xy g

H, J and the gradients are averaged over clients BEFORE they are composed; the mean of the clients' own hypergradients
is another, biased quantity. Nothing here is federated or counted in rounds: these are yardsticks for estimators and
runs. Losses are reached through the oracles of `Problem` alone, which need no derivatives of their own. Everything is
compiled once for each problem, shapes and method, and checks its result before it is returned; x and y are any pytrees
with floating-point arrays (equinox modules too), and their other leaves stay as they are.

Sources: implicit differentiation by conjugate gradients, Pedregosa (ICML 2016); by the Neumann series, Lorraine et al.
(AISTATS 2020); unrolled ("iterative") differentiation, Franceschi et al. (ICML 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.sparse.linalg
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from .data import FederatedData
from .errors import RunError, check, unknown_name
from .problem import Problem, bind, check_losses, trainable

METHODS = ("exact", "cg", "neumann", "unrolled")
DENSE_LIMIT = 1_000  # up to this dim(y) the dense Hessian is used where no method is asked for
NEUMANN_TERMS = 100_000  # the most terms of a series that was given no number
UNROLLED_TERMS = 1_000  # the gradient steps of "unrolled", likewise

Scalar = Float[Array, ""]


def outer_value(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> Scalar:
    """f(x, y), the upper-level loss over all clients, at the given y."""
    return _run(_Lower.value, *_enter(problem, data, x, y), "outer")


def inner_value(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> Scalar:
    """g(x, y), the lower-level loss over all clients, at the given y."""
    return _run(_Lower.value, *_enter(problem, data, x, y), "inner")


def value(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> Scalar:
    """Phi(x) = f(x, y*(x)); y is template and start. Raises as `solution`."""
    return outer_value(problem, data, x, solution(problem, data, x, y))


def hessian(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> Float[Array, "dim_y dim_y"]:
    """H = d2_yy g(x, y) at the given y, dense, in the order of `jax.flatten_util.ravel_pytree(y)`."""
    return _run(_Lower.hessian, *_enter(problem, data, x, y))


def solution(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> PyTree:
    """y*(x), like y: the lower-level model trained on all rows, from the start y, down to rounding errors.

    L-BFGS with a line search (optimistix) comes near; damped Newton steps finish, with the dense Hessian up to
    dim(y) = `DENSE_LIMIT` and by conjugate gradients beyond.

    Raises:
        InputError: x or y cannot be used, or a loss does not return a floating-point scalar.
        RunError: no minimiser was reached, or g is not strongly convex there.
    """
    rest = trainable(y, "y")[1]
    return eqx.combine(_solution(*_enter(problem, data, x, y)), rest)


def stationarity(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> Scalar:
    """|grad Phi(x)|^2 at y*(x), by "exact" up to dim(y) = `DENSE_LIMIT` and "cg" beyond. Raises as `hypergradient`."""
    size = ravel_pytree(trainable(y, "y")[0])[0].size
    h = hypergradient(problem, data, x, y, method="exact" if size <= DENSE_LIMIT else "cg")
    return jnp.sum(ravel_pytree(h)[0] ** 2)


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
        RunError: as `solution`; or the linear solve, the series or the gradient steps did not converge.
    """
    if method not in METHODS:
        raise unknown_name("hypergradient method", method, METHODS)
    series = method in ("neumann", "unrolled")
    check(series or terms is step is None, f"terms= and step= belong to 'neumann' and 'unrolled', not to {method!r}.")
    check(terms is None or (isinstance(terms, int) and terms > 0), f"terms= is a positive whole number; got {terms!r}.")
    check(step is None or 0 < step < math.inf, f"step= is a positive number, below 2 / L; got {step!r}.")
    problem, data, x, y = _enter(problem, data, x, y)
    if solve_inner and method != "unrolled":
        y = _solution(problem, data, x, y)
    size = None if step is None else jnp.asarray(step, jax.tree.leaves(y)[0].dtype)
    if method == "unrolled":
        h, left, size = _run(_Lower.unrolled, problem, data, x, y, terms or UNROLLED_TERMS, size)
        limit = math.inf  # a nonconvex start may rightly grow
    else:
        count = None if terms is None else jnp.asarray(terms, jnp.int32)
        h, left, size = _run(_Lower.implicit, problem, data, x, y, method, count, size)
        limit = 1.01  # a larger residual than without any term: the series diverges
    limit = limit if terms else math.sqrt(jnp.finfo(left.dtype).eps)
    if not (math.isfinite(left) and left <= limit and (size is None or size > 0)):
        hint = (
            f" at step {size:.3g}: keep step= below 2 / L, give terms=, or use 'cg'" if series else ": is H singular?"
        )
        raise RunError(f"{method!r} did not converge (relative residual {left:.2g} in H v = d_y f){hint}.")
    return h


def _enter(problem, data, x, y):
    """What `_run` takes: the problem over the floating-point arrays of x and y, which are checked."""
    (x, x_rest), (y, y_rest) = trainable(x, "x"), trainable(y, "y")
    return bind(problem, x_rest, y_rest), data, x, y


@eqx.filter_jit
def _run(method, problem, data, x, y, *args):
    """A method of `_Lower`, compiled."""
    check_losses(problem, x, y, data.inner.client(0).all(), data.outer.client(0).all())
    flat, unravel = ravel_pytree(y)
    return method(_Lower(problem, data, x, unravel), flat, *args)


def _solution(problem, data, x, y):
    y, reached, gradient, smallest, largest = _run(_Lower.solution, problem, data, x, y)
    if reached and largest > 0 and smallest > 10 * jnp.finfo(smallest.dtype).eps * largest:
        return y
    raise RunError(
        f"the lower-level problem was not solved: the search ended where |d_y g| = {gradient:.2g} and the curvature of "
        f"g goes from {smallest:.2g} to {largest:.2g}; g must be bounded below and strongly convex in y, so add a "
        f"regulariser such as 1e-3 * |y|^2 to the inner loss, or start from another y."
    )


class _Lower(NamedTuple):
    """The lower level at one x, as functions of a flat y."""

    problem: Problem
    data: FederatedData
    x: PyTree
    unravel: Callable[[Float[Array, " dim_y"]], PyTree]

    def mean(self, level: str, oracle: Callable, *args: PyTree) -> PyTree:
        """sum_i p_i oracle(x, *args, rows of client i), eight clients at a time: memory does not grow with clients."""
        m, together = self.data.clients, min(self.data.clients, 8)
        p = self.data.weights  # of both levels: the outer rows' own weights carry p_outer / p_inner
        p = jnp.pad(jnp.full((m,), 1 / m) if p is None else p, (0, -m % together)).reshape(-1, together)
        index = jnp.minimum(jnp.arange(p.size, dtype=jnp.int32), m - 1).reshape(p.shape)

        def reply(index, p):
            out = oracle(self.x, *args, getattr(self.data, level).client(index).all())
            return jax.tree.map(lambda leaf: p.astype(leaf.dtype) * leaf, out)

        def add(total, chunk):
            return jax.tree.map(lambda t, r: t + jnp.sum(r, axis=0), total, jax.vmap(reply)(*chunk)), None

        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(reply, index[0, 0], p[0, 0]))
        return jax.lax.scan(add, zero, (index, p))[0]

    def value(self, y, level):
        return self.mean(level, getattr(self.problem, f"{level}_value"), self.unravel(y))

    def gradient(self, y):
        return ravel_pytree(self.mean("inner", self.problem.inner_gradient, self.unravel(y)))[0]

    def hessian_vector(self, y, v):
        return ravel_pytree(self.mean("inner", self.problem.hessian_vector, self.unravel(y), self.unravel(v)))[0]

    def products(self, y, v):
        """J v, like x, and H v, in one pass over the data."""
        both = lambda *args: (self.problem.cross_vector(*args), self.problem.hessian_vector(*args))
        cross, curvature = self.mean("inner", both, self.unravel(y), self.unravel(v))
        return cross, ravel_pytree(curvature)[0]

    def outer_gradients(self, y):
        d_x, d_y = self.mean("outer", self.problem.outer_gradients, self.unravel(y))
        return d_x, ravel_pytree(d_y)[0]

    def hessian(self, y):
        return jax.lax.map(lambda v: self.hessian_vector(y, v), jnp.eye(y.size, dtype=y.dtype), batch_size=64).T

    def extremes(self, y):
        """The smallest and largest eigenvalue of H: up to `DENSE_LIMIT` exact, beyond by 100 power iterations each."""
        if y.size <= DENSE_LIMIT:
            eigenvalues = jnp.linalg.eigvalsh(self.hessian(y))
            return eigenvalues[0], eigenvalues[-1]

        def top(product):
            def iterate(_, state):
                v = state[1] / jnp.maximum(_norm(state[1]), jnp.finfo(y.dtype).tiny)
                w = product(v)
                return jnp.sum(v * w), w

            start = jnp.zeros((), y.dtype), jax.random.normal(jax.random.key(0), y.shape, y.dtype)
            return jax.lax.fori_loop(0, 100, iterate, start)[0]

        largest = top(lambda v: self.hessian_vector(y, v))
        return largest - top(lambda v: largest * v - self.hessian_vector(y, v)), largest

    def solve(self, y, b, dense, accuracy):
        """H(y)^{-1} b, densely or to a relative accuracy; it promises nothing where H is not positive definite."""
        if dense:
            return lx.linear_solve(lx.MatrixLinearOperator(self.hessian(y)), b, lx.LU(), throw=False).value
        # not lineax's: that gives NaN where curvatures are below 100 dim(y) rounding errors, which in float32 they are
        return jax.scipy.sparse.linalg.cg(lambda v: self.hessian_vector(y, v), b, tol=accuracy)[0]

    def implicit(self, y, method, terms, step):
        """The hypergradient at y, the relative residual of its linear system, the step."""
        d_x, b = self.outer_gradients(y)
        if method == "neumann":
            step = 1 / self.extremes(y)[1] if step is None else step
            v = self.neumann(y, b, terms, step)
        else:
            v = self.solve(y, b, method == "exact", accuracy=0.1 * _rounding(b, 0.75))
        cross, product = self.products(y, v)
        return jax.tree.map(jnp.subtract, d_x, cross), _ratio(b - product, b), step

    def neumann(self, y, b, terms, step):
        """step * sum_{k < terms} (I - step H)^k b: its partial sums v, whose residuals b - H v are its next powers."""
        accuracy, terms = (_rounding(b, 0.75), NEUMANN_TERMS) if terms is None else (0.0, terms)

        def add(state):
            k, v, power = state
            return k + 1, v + step * power, power - step * self.hessian_vector(y, power)

        def unfinished(state):
            return (state[0] < terms) & (_norm(state[2]) > accuracy * _norm(b))

        return jax.lax.while_loop(unfinished, add, (jnp.zeros((), jnp.int32), jnp.zeros_like(b), b))[1]

    def unrolled(self, y, terms, step):
        """Reverse mode through y_{k+1} = y_k - step d_y g(x, y_k), written out; otherwise as `implicit`."""
        step = 1 / self.extremes(y)[1] if step is None else step
        y, path = jax.lax.scan(lambda y, _: (y - step * self.gradient(y), y), y, None, length=terms)
        d_x, d_y = self.outer_gradients(y)

        def back(carry, y):
            h, v = carry
            cross, product = self.products(y, v)
            return (jax.tree.map(lambda a, b: a - step.astype(b.dtype) * b, h, cross), v - step * product), None

        (h, v), _ = jax.lax.scan(back, (d_x, d_y), path, reverse=True)
        return h, _ratio(v, d_y), step

    def solution(self, y):
        """The end of the search for y*, whether that is y*, and |d_y g| and the extremes of H there."""

        def newton(state):
            y, gradient, damping, k, *_ = state
            move = self.solve(y, gradient, y.size <= DENSE_LIMIT, accuracy=_rounding(y, 0.5))
            trial = y - damping * move
            trial_gradient = self.gradient(trial)
            old, new = _norm(gradient), _norm(trial_gradient)
            reached = _norm(move) <= _rounding(y, 0.4) * (1 + _norm(y))  # Newton's method squares this at each step
            done = reached & ~(new < old / 2)  # and when it no longer does, rounding errors are all that is left
            y, gradient = jnp.where(new < old, trial, y), jnp.where(new < old, trial_gradient, gradient)
            damping = jnp.where(new < old, jnp.minimum(4 * damping, 1), damping / 4)
            return y, gradient, damping, k + 1, reached, done

        def unfinished(state):
            _, _, damping, k, _, done = state
            return ~done & (damping > 1e-4) & (k < 100)

        y, no = self.descend(y), jnp.zeros((), bool)
        start = y, self.gradient(y), jnp.ones((), y.dtype), jnp.zeros((), jnp.int32), no, no
        y, gradient, _, _, reached, _ = jax.lax.while_loop(unfinished, newton, start)
        return self.unravel(y), reached, _norm(gradient), *self.extremes(y)

    def descend(self, y):
        """Near y* by L-BFGS, which is safe far from it; the start itself if g turns out to have no bottom."""
        import optimistix as optx  # slow to import, and for this alone

        wide = jnp.result_type(float)  # optimistix holds its step sizes in this dtype, whatever that of y

        def value_and_gradient(z):
            both = lambda *args: (self.problem.inner_value(*args), self.problem.inner_gradient(*args))
            value, gradient = self.mean("inner", both, self.unravel(z.astype(y.dtype)))
            return value.astype(wide), ravel_pytree(gradient)[0].astype(wide)

        @jax.custom_jvp
        def value(z):
            return value_and_gradient(z)[0]

        @value.defjvp
        def _(z, tangent):
            value, gradient = value_and_gradient(*z)
            return value, jnp.sum(gradient * tangent[0])

        solver = optx.LBFGS(rtol=_rounding(y, 0.5), atol=_rounding(y, 0.5))
        end = optx.minimise(lambda z, _: value(z), solver, y.astype(wide), max_steps=2_000, throw=False).value
        return jnp.where(jnp.all(jnp.isfinite(end)), end.astype(y.dtype), y)


def _norm(vector):
    return jnp.sqrt(jnp.sum(vector**2))


def _ratio(one, other):
    return _norm(one) / jnp.maximum(_norm(other), jnp.finfo(other.dtype).tiny)


def _rounding(vector, power: float) -> float:
    """eps ** power for the dtype; power 0.75 (1.8e-12 in float64, 6.4e-6 in float32) leaves room for long sums."""
    return float(jnp.finfo(vector.dtype).eps) ** power
