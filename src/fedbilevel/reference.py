"""Centralised references: the lower-level solution and the hypergradient, from the rows of all clients at once.

    f = sum_i p_i f_i,   g = sum_i p_i g_i,   y*(x) = argmin_y g(x, y),   Phi(x) = f(x, y*(x))
    grad Phi(x) = d_x f - J H^{-1} d_y f   at (x, y*(x)),   H = d2_yy g,   J = d2_xy g

H, J and the gradients are averaged over clients BEFORE they are composed; the mean of the clients' own hypergradients
is another, biased quantity. Nothing here is federated or counted in rounds: these are the yardsticks for estimators
and runs. Losses are reached through the oracles of `Problem` alone, so problems with oracles of their own have
references too. Everything is compiled once for each problem, shapes and method; x and y are any pytrees of
floating-point arrays (equinox modules too), and the rest of their leaves stays as it is.

Sources: implicit differentiation by conjugate gradients, Pedregosa (ICML 2016); by the Neumann series, Lorraine et al.
(AISTATS 2020); unrolled ("iterative") differentiation, Franceschi et al. (ICML 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.scipy.sparse.linalg
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from .data import FederatedData
from .errors import RunError, check, unknown_name
from .problem import Problem, bind, check_losses, trainable

METHODS = ("exact", "cg", "neumann", "unrolled")
DENSE_LIMIT = 1_000  # up to this dim(y) the Hessian is built where nothing else is asked for
NEUMANN_TERMS = 100_000  # the most terms of a series that was given no number
UNROLLED_TERMS = 1_000  # the gradient steps of "unrolled", likewise

Scalar = Float[Array, ""]
Vector = Float[Array, " dim_y"]
Matrix = Float[Array, "dim_y dim_y"]


def outer_value(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> Scalar:
    """f(x, y), the upper-level loss over all clients, at the given y."""
    return _run(_Lower.outer_value, *_enter(problem, data, x, y))


def inner_value(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> Scalar:
    """g(x, y), the lower-level loss over all clients, at the given y."""
    return _run(_Lower.inner_value, *_enter(problem, data, x, y))


def value(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> Scalar:
    """Phi(x) = f(x, y*(x)); y is template and start. Raises as `solution`."""
    return outer_value(problem, data, x, solution(problem, data, x, y))


def hessian(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> Matrix:
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
    problem, data, x, arrays = _enter(problem, data, x, y)
    return eqx.combine(_solution(problem, data, x, arrays), trainable(y, "y")[1])


def stationarity(problem: Problem, data: FederatedData, x: PyTree, y: PyTree) -> Scalar:
    """|grad Phi(x)|^2 at y*(x), by "exact" up to dim(y) = `DENSE_LIMIT` and "cg" beyond. Raises as `hypergradient`."""
    size = ravel_pytree(trainable(y, "y")[0])[0].size
    h = hypergradient(problem, data, x, y, method="exact" if size <= DENSE_LIMIT else "cg")
    return _norm(ravel_pytree(h)[0]) ** 2


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
    """grad Phi(x) at y*(x), like x; None where x has a leaf that is not a floating-point array, as in `eqx.filter_grad`.

    Args:
        y: template and start of the lower-level solve.
        method: how v* = H^{-1} d_y f is found: "exact", a linear solve with the dense (dim y, dim y) Hessian; "cg",
            conjugate gradients; "neumann", step * sum_{k < terms} (I - step H)^k d_y f, which is off by at most
            (1 - step mu)^terms |v*|. "unrolled" differentiates f(x, y_K(x)) through K = terms gradient steps from y
            instead, in reverse mode: y is not solved for first, and memory holds terms copies of it.
        terms: None: for "neumann" until nothing but rounding errors is left, at most `NEUMANN_TERMS`; for "unrolled"
            `UNROLLED_TERMS`, which promises no accuracy.
        step: below 2 / L, L the largest eigenvalue of H. None: 1 / L, at y*(x) or at the start of "unrolled".
        solve_inner: False evaluates the formula at the given y instead of y*(x).

    Raises:
        InputError: as `solution`; an unknown method; terms or step that are not positive or that it does not take.
        RunError: as `solution`; the linear solve, the series or the gradient steps did not converge.
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
    step = step if step is None else jnp.asarray(step, jax.tree.leaves(y)[0].dtype)
    if method == "unrolled":
        h, residual, step = _run(_Lower.unrolled, problem, data, x, y, terms or UNROLLED_TERMS, step)
        limit = math.inf  # the first steps from far away may well grow
    else:
        count = terms if terms is None else jnp.asarray(terms, jnp.int32)
        h, residual, step = _run(_Lower.implicit, problem, data, x, y, method, count, step)
        limit = 1.01
    limit = math.sqrt(jnp.finfo(residual.dtype).eps) if terms is None else limit
    if not (math.isfinite(residual) and residual <= limit):
        advice = f"the step was {step:.3g}: keep step= below 2 / L and raise terms=, or use 'cg'" if series else "is g flat?"
        raise RunError(f"{method!r} left the relative residual {residual:.2g} in its linear system; {advice}.")
    return h


def _enter(problem, data, x, y):
    """What the compiled functions take: the problem over the floating-point arrays of x and y, which are checked."""
    (x, x_rest), (y, y_rest) = trainable(x, "x"), trainable(y, "y")
    problem = bind(problem, x_rest, y_rest)
    check_losses(problem, x, y, *jax.eval_shape(lambda d: (d.inner.client(0).all(), d.outer.client(0).all()), data))
    return problem, data, x, y


def _solution(problem, data, x, y):
    y, reached, gradient, smallest, largest = _run(_Lower.solution, problem, data, x, y)
    if reached and largest > 0 and smallest > 10 * jnp.finfo(smallest.dtype).eps * largest:
        return y
    raise RunError(
        f"the lower-level problem has no solution that could be reached: the solve ended where |d_y g| = {gradient:.2g} "
        f"and the curvature of g goes from {smallest:.2g} to {largest:.2g}; g must be bounded below and strongly convex "
        f"in y, so add a regulariser such as 1e-3 * |y|^2 to the inner loss, or start from another y."
    )


class _Lower(NamedTuple):
    """The lower level at one x, as functions of a flat y; to be used inside `_run`."""

    problem: Problem
    data: FederatedData
    x: PyTree
    unravel: Callable[[Vector], PyTree]

    def mean(self, level: str, oracle: Callable, *args: PyTree) -> PyTree:
        """sum_i p_i oracle(x, *args, rows of client i), eight clients at a time: memory does not grow with clients."""
        m, together = self.data.clients, min(self.data.clients, 8)
        p = self.data.weights  # at both levels: the outer rows' own weights carry p_outer / p_inner
        p = jnp.full((m,), 1 / m) if p is None else p
        p = jnp.pad(p, (0, -m % together)).reshape(-1, together)
        index = jnp.minimum(jnp.arange(p.size, dtype=jnp.int32), m - 1).reshape(p.shape)

        def reply(index, p):
            out = oracle(self.x, *args, getattr(self.data, level).client(index).all())
            return jax.tree.map(lambda leaf: p.astype(leaf.dtype) * leaf, out)

        def add(total, chunk):
            replies = jax.vmap(reply)(*chunk)
            return jax.tree.map(lambda t, r: t + jnp.sum(r, axis=0), total, replies), None

        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(reply, index[0, 0], p[0, 0]))
        return jax.lax.scan(add, zero, (index, p))[0]

    def inner_value(self, y):
        return self.mean("inner", self.problem.inner_value, self.unravel(y))

    def outer_value(self, y):
        return self.mean("outer", self.problem.outer_value, self.unravel(y))

    def gradient(self, y):
        return ravel_pytree(self.mean("inner", self.problem.inner_gradient, self.unravel(y)))[0]

    def hessian_vector(self, y, v):
        return ravel_pytree(self.mean("inner", self.problem.hessian_vector, self.unravel(y), self.unravel(v)))[0]

    def cross_vector(self, y, v):
        return self.mean("inner", self.problem.cross_vector, self.unravel(y), self.unravel(v))

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
                v = state[1] / _norm(state[1])
                return jnp.sum(v * product(v)), product(v)

            start = jnp.zeros((), y.dtype), jax.random.normal(jax.random.key(0), y.shape, y.dtype)
            return jax.lax.fori_loop(0, 100, iterate, start)[0]

        largest = top(lambda v: self.hessian_vector(y, v))
        return largest - top(lambda v: largest * v - self.hessian_vector(y, v)), largest

    def solve(self, y, b, dense):
        """H(y)^{-1} b; it promises nothing where H is not positive definite."""
        if dense:
            return lx.linear_solve(lx.MatrixLinearOperator(self.hessian(y)), b, lx.LU(), throw=False).value
        return jax.scipy.sparse.linalg.cg(lambda v: self.hessian_vector(y, v), b, tol=0.1 * _tolerance(b))[0]

    def implicit(self, y, method, terms, step):
        d_x, b = self.outer_gradients(y)
        if method == "neumann":
            step = 1 / self.extremes(y)[1] if step is None else step
            v = self.neumann(y, b, terms, step)
        else:
            v = self.solve(y, b, dense=method == "exact")
        residual = _norm(b - self.hessian_vector(y, v)) / _positive(_norm(b))
        return jax.tree.map(jnp.subtract, d_x, self.cross_vector(y, v)), residual, step

    def neumann(self, y, b, terms, step):
        """step * sum_{k < terms} (I - step H)^k b, by its partial sums v and their residuals b - H v."""
        accuracy, terms = (_tolerance(b), NEUMANN_TERMS) if terms is None else (0.0, terms)

        def add(state):
            k, v, residual = state
            return k + 1, v + step * residual, residual - step * self.hessian_vector(y, residual)

        def unfinished(state):
            return (state[0] < terms) & (_norm(state[2]) > accuracy * _norm(b))

        return jax.lax.while_loop(unfinished, add, (jnp.zeros((), jnp.int32), jnp.zeros_like(b), b))[1]

    def unrolled(self, y, terms, step):
        """Reverse mode through y_{k+1} = y_k - step d_y g(x, y_k), written out: the oracles need no derivatives."""
        step = 1 / self.extremes(y)[1] if step is None else step
        y, path = jax.lax.scan(lambda y, _: (y - step * self.gradient(y), y), y, None, length=terms)
        d_x, d_y = self.outer_gradients(y)

        def back(carry, y):
            h, v = carry
            h = jax.tree.map(lambda a, b: a - step.astype(b.dtype) * b, h, self.cross_vector(y, v))
            return (h, v - step * self.hessian_vector(y, v)), None

        (h, v), _ = jax.lax.scan(back, (d_x, d_y), path, reverse=True)
        return h, _norm(v) / _positive(_norm(d_y)), step

    def solution(self, y):
        """y*, whether it was reached, |d_y g| and the extremes of H there."""
        y = self.descend(y)
        one = jnp.ones((), y.dtype)
        near = float(jnp.finfo(y.dtype).eps) ** 0.4  # a Newton step of this relative length is followed by one of its square

        def newton(state):
            y, gradient, damping, *_, k = state
            move = self.solve(y, gradient, dense=y.size <= DENSE_LIMIT)
            trial = y - damping * move
            trial_gradient = self.gradient(trial)
            old, new = _norm(gradient), _norm(trial_gradient)
            reached = _norm(move) <= near * (1 + _norm(y))
            rounding = reached & ~(new < old / 2)
            better = new < old
            y, gradient = jnp.where(better, trial, y), jnp.where(better, trial_gradient, gradient)
            damping = jnp.where(better, jnp.minimum(4 * damping, one), damping / 4)
            return y, gradient, damping, reached, rounding, k + 1

        def unfinished(state):
            _, _, damping, _, rounding, k = state
            return ~rounding & (damping > 1e-4) & (k < 100)

        no = jnp.zeros((), bool)
        start = y, self.gradient(y), one, no, no, jnp.zeros((), jnp.int32)
        y, gradient, _, reached, *_ = jax.lax.while_loop(unfinished, newton, start)
        return self.unravel(y), reached, _norm(gradient), *self.extremes(y)

    def descend(self, y):
        """Near y* by L-BFGS, which needs no curvature and no good start; y itself if it runs away."""
        import optimistix as optx  # here, because nothing else in the library needs it

        wide = jnp.result_type(float)  # the dtype in which optimistix holds its step sizes

        @jax.custom_jvp
        def value(z):
            return self.inner_value(z.astype(y.dtype)).astype(wide)

        @value.defjvp
        def _(z, tangent):
            return value(*z), jnp.sum(self.gradient(z[0].astype(y.dtype)).astype(wide) * tangent[0])

        accuracy = float(jnp.finfo(y.dtype).eps) ** 0.5
        solver = optx.LBFGS(rtol=accuracy, atol=accuracy)
        end = optx.minimise(lambda z, _: value(z), solver, y.astype(wide), max_steps=2_000, throw=False).value
        return jnp.where(jnp.all(jnp.isfinite(end)), end.astype(y.dtype), y)


@eqx.filter_jit
def _run(function, problem, data, x, y, *args):
    """A method of `_Lower`, compiled; its step sizes and numbers of terms are traced."""
    flat, unravel = ravel_pytree(y)
    return function(_Lower(problem, data, x, unravel), flat, *args)


def _norm(vector: Vector) -> Scalar:
    return jnp.sqrt(jnp.sum(vector**2))


def _positive(norm: Scalar) -> Scalar:
    return jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)


def _tolerance(vector: Vector) -> float:
    """A bound on rounding errors that leaves room for long sums: 1.8e-12 in float64, 6.4e-6 in float32."""
    return float(jnp.finfo(vector.dtype).eps) ** 0.75
