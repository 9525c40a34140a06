"""The lower level at one x, as functions of a flat y: means over clients, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree

from .. import owned
from ..data import FederatedData
from ..oracles import around
from ..problem import Problem
from .judge import Evidence
from .linear import Count, Flat, Matrix, Product, Refined, Scalar, correct, lanczos, neumann, norm, rounding
from .search import descend, newton

Chunk = tuple[Int[Array, " together"], Float[Array, " together"]]  # some clients, and their weights


class Lower(NamedTuple):
    """The lower level at one x; y and v are flat, and hold the moving leaves of y alone.

    Attributes:
        problem, data, x: as given.
        still: y with None for its moving leaves: those that the inner loss does not depend on stay where they are.
        unravel: a flat y -> a tree like y, with None for the others.
        dense: whether the Hessian is formed where no method asks for it.
    """

    problem: Problem
    data: FederatedData
    x: PyTree
    still: PyTree
    unravel: Callable[[Flat], PyTree]
    dense: bool

    # Trees from flat vectors, and back --------------------------------------------------------------------------------

    def full(self, y: Flat) -> PyTree:
        """y as the oracles take it."""
        return _either(self.unravel(y), self.still)

    def direction(self, v: Flat) -> PyTree:
        """v as the oracles take it: zero where y stays."""
        return _either(self.unravel(v), jax.tree.map(jnp.zeros_like, self.still))

    def flat(self, tree: PyTree) -> Flat:
        """The moving leaves of a tree like y."""
        moving = jax.tree.map(
            lambda still, leaf: leaf if still is None else None, self.still, tree, is_leaf=lambda leaf: leaf is None
        )
        return ravel_pytree(moving)[0]

    # Means over clients -----------------------------------------------------------------------------------------------

    def mean(self, level: str, oracle: Callable, *args: PyTree) -> PyTree:
        """sum_i p_i oracle(x, *args, rows of client i), eight clients at a time: memory does not grow with clients."""
        m, together, clients = self.data.clients, min(self.data.clients, 8), getattr(self.data, level)
        p = self.data.weights  # of both levels: the outer rows' own weights carry p_outer / p_inner
        p = jnp.pad(jnp.full((m,), 1 / m) if p is None else p, (0, -m % together)).reshape(-1, together)
        index = jnp.minimum(jnp.arange(p.size, dtype=jnp.int32), m - 1).reshape(p.shape)

        @jax.jit  # traced once, for its shapes and for the loop
        def reply(index: Count, p: Scalar) -> PyTree:
            out = oracle(*owned.own((self.x, *args), index), clients.client(index, clients.cut(together)).all())
            return jax.tree.map(lambda leaf: p.astype(leaf.dtype) * leaf, out)

        def some(index: Int[Array, " together"], p: Float[Array, " together"]) -> PyTree:
            replies = jax.vmap(reply)(index, p)
            summed = jax.tree.map(lambda r: jnp.sum(r, axis=0), owned.without(replies))
            return owned.together(summed, owned.added(replies, index, m))

        def add(total: PyTree, chunk: Chunk) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, some(*chunk)), None

        if len(index) == 1:
            return some(index[0], p[0])
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(some, index[0], p[0]))
        return jax.lax.scan(add, zero, (index, p))[0]

    def value(self, y: Flat, level: str) -> Scalar:
        if level == "outer" and self.problem.outer_means is not None:
            return self.problem.value_of(self.means(y))
        return self.mean(level, getattr(self.problem, f"{level}_value"), self.full(y))

    def gradient(self, y: Flat) -> Flat:
        return self.flat(self.mean("inner", self.problem.inner_gradient, self.full(y)))

    def value_and_gradient(self, y: Flat) -> tuple[Scalar, Flat]:
        both = lambda *args: (self.problem.inner_value(*args), self.problem.inner_gradient(*args))
        value, gradient = self.mean("inner", both, self.full(y))
        return value, self.flat(gradient)

    def hessian_vector(self, y: Flat, v: Flat) -> Flat:
        return self.flat(self.mean("inner", self.problem.hessian_vector, self.full(y), self.direction(v)))

    def products(self, y: Flat, v: Flat) -> tuple[PyTree, Flat]:
        """J v, like x, and H v, in one pass over the data."""
        both = lambda *args: (self.problem.cross_vector(*args), self.problem.hessian_vector(*args))
        cross, curvature = self.mean("inner", both, self.full(y), self.direction(v))
        return cross, self.flat(curvature)

    def means(self, y: Flat) -> PyTree:
        """Of an outer loss of means: those over all clients."""
        return self.mean("outer", self.problem.means, self.full(y))

    def outer_gradients(self, y: Flat) -> tuple[PyTree, Flat]:
        problem = self.problem if self.problem.outer_means is None else around(self.problem, self.means(y))
        d_x, d_y = self.mean("outer", problem.outer_gradients, self.full(y))
        return d_x, self.flat(d_y)

    def hessian(self, y: Flat) -> Matrix:
        return jax.lax.map(lambda v: self.hessian_vector(y, v), jnp.eye(y.size, dtype=y.dtype), batch_size=64).T

    # The linear system ------------------------------------------------------------------------------------------------

    def curvature(self, y: Flat, form: bool) -> tuple[Matrix | None, Product]:
        """(H(y), or None where it is not formed; v -> H(y) v)."""
        matrix = self.hessian(y) if form or self.dense else None
        return matrix, lambda v: self.hessian_vector(y, v) if matrix is None else matrix @ v

    def extremes(self, y: Flat, matrix: Matrix | None) -> tuple[Scalar, Scalar]:
        """The smallest and largest eigenvalue of H: exact where it is dense, else by Lanczos' method."""
        if matrix is not None and self.dense:
            eigenvalues = jnp.linalg.eigvalsh(matrix)
            return eigenvalues[0], eigenvalues[-1]
        return lanczos(lambda v: self.hessian_vector(y, v), y.size, y.dtype)

    def solver(self, y: Flat, matrix: Matrix | None, accuracy: float) -> Product:
        """b -> H(y)^{-1} b, densely or to a relative accuracy; nothing is promised where H is not positive definite."""
        if matrix is not None:
            factors = jax.scipy.linalg.lu_factor(matrix)
            return lambda b: jax.scipy.linalg.lu_solve(factors, b)
        product = lambda v: self.hessian_vector(y, v)
        most = 10 * y.size + 5_000  # rounding errors make more of it than dim(y) steps
        return lambda b: jax.scipy.sparse.linalg.cg(product, b, tol=accuracy, maxiter=most)[0]

    def refined(self, y: Flat, matrix: Matrix | None, start: Refined | None, d_x: PyTree, b: Flat) -> Refined:
        """The solution of H v = b, corrected until J v stands still."""
        solve = self.solver(y, matrix, accuracy=0.1 * rounding(b.dtype, 0.75))
        zeros = jax.tree.map(jnp.zeros_like, d_x)
        start = start or Refined(jnp.zeros_like(b), zeros, b, jnp.full((), jnp.inf, b.dtype))
        return correct(solve, lambda v: self.products(y, v), start, d_x, b)

    def moved(self, y: Flat, matrix: Matrix | None, v: Flat, h: PyTree) -> Scalar:
        """How far a last Newton step moves the hypergradient: the error that y* has, in that of the result."""
        solve = self.solver(y, matrix, accuracy=rounding(y.dtype, 0.5))
        y = y - solve(self.gradient(y))
        d_x, b = self.outer_gradients(y)
        v = v + solve(b - self.hessian_vector(y, v))
        return norm(_minus(_minus(d_x, self.products(y, v)[0]), h))

    # Hypergradients ---------------------------------------------------------------------------------------------------

    def implicit(
        self, y: Flat, method: str, terms: Count | None, step: Scalar | None, extremes: Sequence[Scalar] | None
    ) -> tuple[PyTree, Evidence]:
        """The hypergradient at y, and what tells whether it is right: see `judge.Evidence`."""
        d_x, b = self.outer_gradients(y)
        matrix, product = self.curvature(y, form=method == "exact")
        smallest, largest = self.extremes(y, matrix) if extremes is None else extremes
        if method == "cg":
            matrix = None
        if method != "neumann":
            end = self.refined(y, matrix, None, d_x, b)
            h, off = _minus(d_x, end.cross), end.change
            if extremes is not None:
                off = off + self.moved(y, matrix, end.v, h)
            return h, _evidence(end, end, off, d_x, b, None, smallest, largest)
        step = 1 / largest if step is None else step
        v = neumann(product, b, terms, step, smallest / largest)
        cross, curved = self.products(y, v)
        series = end = Refined(v, cross, b - curved, jnp.zeros((), b.dtype))
        h, off = _minus(d_x, cross), series.change
        if terms is None:
            end = self.refined(y, matrix, series, d_x, b)
            off = jnp.maximum(end.change, norm(_minus(end.cross, cross)))
        if terms is None and extremes is not None:
            off = off + self.moved(y, matrix, v, h)
        return h, _evidence(series, end, off, d_x, b, step, smallest, largest)

    def unrolled(self, y: Flat, terms: int, step: Scalar | None, judged: bool) -> tuple[PyTree, Evidence]:
        """Reverse mode through y_{k+1} = y_k - step d_y g(x, y_k), written out; otherwise as `implicit`.

        judged: compare with `implicit` a Newton step further.
        """
        if step is None:
            step = 1 / self.extremes(y, self.curvature(y, form=False)[0])[1]
        y, path = jax.lax.scan(lambda y, _: (y - step * self.gradient(y), y), y, None, length=terms)
        d_x, d_y = self.outer_gradients(y)

        def back(carry: tuple[PyTree, Flat], y: Flat) -> tuple[tuple[PyTree, Flat], None]:
            h, v = carry
            cross, product = self.products(y, v)
            return (jax.tree.map(lambda a, b: a - step.astype(b.dtype) * b, h, cross), v - step * product), None

        (h, v), _ = jax.lax.scan(back, (d_x, d_y), path, reverse=True)
        zero = jnp.zeros((), d_y.dtype)
        if not judged:
            series = Refined(v, h, v, zero)
            return h, _evidence(series, series, zero, d_x, d_y, step, zero, zero)
        matrix, _ = self.curvature(y, form=False)
        y = y - self.solver(y, matrix, rounding(y.dtype, 0.75))(self.gradient(y))
        true, seen = self.implicit(y, "cg" if matrix is None else "exact", None, None, None)
        size = norm(d_x) + norm(_minus(true, d_x))
        off = seen["error"] + norm(_minus(h, true)) / jnp.maximum(size, jnp.finfo(size.dtype).tiny)
        return h, {**seen, "residual": _ratio(v, d_y), "error": off, "step": step}

    def solution(self, y: Flat) -> tuple[PyTree, Bool[Array, ""], Scalar, Scalar, Scalar]:
        """y*, and what tells whether it is: whether the search reached it, |d_y g| and the extremes of H there."""
        y = descend(self, y)
        y, gradient, reached = newton(self, y)
        smallest, largest = self.extremes(y, self.curvature(y, form=False)[0])
        return self.full(y), reached, norm(gradient), smallest, largest


def _evidence(
    given: Refined,
    end: Refined,
    off: Scalar,
    d_x: PyTree,
    b: Flat,
    step: Scalar | None,
    smallest: Scalar,
    largest: Scalar,
) -> Evidence:
    """What `judge` looks at: of the solution that is returned, and of the corrected one that it was compared with."""
    size = norm(d_x) + norm(end.cross)
    return {
        "residual": _ratio(given.left, b),
        "corrected": _ratio(end.left, b),
        "error": jnp.where(off > 0, off / jnp.maximum(size, jnp.finfo(size.dtype).tiny), off),
        "step": step,
        "smallest": smallest,
        "largest": largest,
    }


def _either(one: PyTree, other: PyTree) -> PyTree:
    """The leaves that are not None, of either tree."""
    return jax.tree.map(lambda a, b: b if a is None else a, one, other, is_leaf=lambda leaf: leaf is None)


def _minus(one: PyTree, other: PyTree) -> PyTree:
    return jax.tree.map(jnp.subtract, one, other)


def _ratio(one: Flat, other: Flat) -> Scalar:
    return norm(one) / jnp.maximum(norm(other), jnp.finfo(other.dtype).tiny)
