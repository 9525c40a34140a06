"""Directions that a client makes of its oracles, at one point and on given rows.

The local hypergradient (`LocalNeumann`) is the one that is NOT averaged before it is composed.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import optax.tree
from jaxtyping import PyTree

from ...problem import Problem, Rows
from .steps import Rate, descend, norm


def inner_gradient(problem: Problem, x: PyTree, rows: Rows) -> Callable[[PyTree], PyTree]:
    """y -> d_y g(x, y) on the rows."""
    return lambda y: problem.inner_gradient(x, y, rows)


def hessian_factor(problem: Problem, x: PyTree, y: PyTree, v: PyTree, lr: Rate, rows: Rows) -> PyTree:
    """(I - lr d2_yy g) v."""
    return descend(v, lr, problem.hessian_vector(x, y, v, rows))


def hypergradient(problem: Problem, x: PyTree, y: PyTree, v: PyTree, inner: Rows, outer: Rows) -> PyTree:
    """d_x f - d2_xy g v, like x: the hypergradient, once v is (an estimate of) H^{-1} d_y f."""
    direct, _ = problem.outer_gradients(x, y, outer)
    return optax.tree.sub(direct, problem.cross_vector(x, y, v, inner))


def direction(problem: Problem, z: PyTree, inner: Rows, outer: Rows) -> PyTree:
    """D(z) = (d_x f - d2_xy g v, d_y g, d2_yy g v - d_y f) at z = (x, y, v).

    Its mean over clients is zero where y = y*(x), v = H^{-1} d_y f and grad Phi(x) = 0.
    """
    x, y, v = z
    direct, pull = problem.outer_gradients(x, y, outer)
    cross, product = problem.cross_vector(x, y, v, inner), problem.hessian_vector(x, y, v, inner)
    return optax.tree.sub(direct, cross), problem.inner_gradient(x, y, inner), optax.tree.sub(product, pull)


def first_order_direction(problem: Problem, z: PyTree, inner: Rows, outer: Rows, distance: Rate) -> PyTree:
    """`direction` by central differences of d_x g and d_y g at y +- d v, where |d v| is `distance`: no second derivative."""
    x, y, v = z
    direct, pull = problem.outer_gradients(x, y, outer)
    length = norm(v)
    d = distance / jnp.where(length > 0, length, 1)
    ahead, behind = optax.tree.add_scale(y, d, v), optax.tree.add_scale(y, -d, v)
    along = lambda of: optax.tree.scale(1 / (2 * d), optax.tree.sub(of(x, ahead, inner), of(x, behind, inner)))
    cross, product = along(problem.inner_gradient_x), along(problem.inner_gradient)
    return optax.tree.sub(direct, cross), problem.inner_gradient(x, y, inner), optax.tree.sub(product, pull)
