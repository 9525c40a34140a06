"""The linear system H v = b: its series, corrections that measure the error of what is made of v, extreme eigenvalues."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

NEUMANN_TERMS = 100_000  # the most terms of a series that was given no number
CORRECTIONS = 5  # the most solves for one system
LANCZOS_STEPS = 100

Flat = Float[Array, " dim_y"]
Matrix = Float[Array, "dim_y dim_y"]
Scalar = Float[Array, ""]
Count = Int[Array, ""]
Product = Callable[[Flat], Flat]  # with a matrix, or its inverse


class Refined(NamedTuple):
    """An approximate solution of H v = b.

    Attributes:
        v: the solution.
        cross: J v, like x.
        left: b - H v, computed anew from v.
        change: |J e| of the last correction e, the solution of H e = left before it: the error of J v before it.
    """

    v: Flat
    cross: PyTree
    left: Flat
    change: Scalar


def correct(
    solve: Product, products: Callable[[Flat], tuple[PyTree, Flat]], start: Refined, d_x: PyTree, b: Flat
) -> Refined:
    """Correct v by solutions of H e = b - H v until J v, the part of the hypergradient that v enters, stands still.

    A small residual alone says little: along an eigenvector of curvature 1e-8 it hides an error 1e8 times as large. Its
    own solution e is that error, and J e what it does to the result. Where rounding errors are all that is left, J e
    stays at their size, so that too little precision shows as well.

    Args:
        solve: b -> about H^{-1} b.
        products: v -> (J v, H v).
        start: what to go on from: zeros and b, or a solution that was found otherwise.
        d_x: the other part of the hypergradient, for the scale of errors.
    """
    accuracy = 0.01 * rounding(b.dtype, 0.4)

    def turn(state: tuple[Count, Refined]) -> tuple[Count, Refined]:
        k, old = state
        v = old.v + solve(old.left)
        cross, product = products(v)
        change = norm(jax.tree.map(jnp.subtract, cross, old.cross))
        return k + 1, Refined(v, cross, b - product, change)

    def unfinished(state: tuple[Count, Refined]) -> Bool[Array, ""]:
        k, now = state
        moving = now.change > accuracy * (norm(d_x) + norm(now.cross))
        return (k < 2) | ((k < CORRECTIONS) & moving)

    return jax.lax.while_loop(unfinished, turn, (jnp.zeros((), jnp.int32), start))[1]


def neumann(product: Product, b: Flat, terms: Count | None, step: Scalar, conditioning: Scalar) -> Flat:
    """step * sum_{k < terms} (I - step H)^k b: its partial sums v, whose residuals b - H v are its next powers.

    terms None: until what is left out is a rounding error of v even along the smallest eigenvalue, which is
    `conditioning` times the largest.
    """
    tail = rounding(b.dtype, 0.75) * jnp.where(conditioning > 0, jnp.minimum(conditioning, 1), 1)
    accuracy, most = (tail, NEUMANN_TERMS) if terms is None else (jnp.zeros((), b.dtype), terms)

    def add(state: tuple[Count, Flat, Flat]) -> tuple[Count, Flat, Flat]:
        k, v, power = state
        return k + 1, v + step * power, power - step * product(power)

    def unfinished(state: tuple[Count, Flat, Flat]) -> Bool[Array, ""]:
        return (state[0] < most) & (norm(state[2]) > accuracy * norm(b))

    return jax.lax.while_loop(unfinished, add, (jnp.zeros((), jnp.int32), jnp.zeros_like(b), b))[1]


_Steps = Float[Array, " steps"]
_Lanczos = tuple[Float[Array, "steps dim_y"], _Steps, _Steps, Flat]  # vectors; diagonal and beside it; the next vector


def lanczos(product: Product, size: int, dtype: np.dtype | type) -> tuple[Scalar, Scalar]:
    """The smallest and largest Ritz value of a symmetric matrix after up to `LANCZOS_STEPS` products.

    Every vector is made orthogonal to all before it, twice; where they span an invariant subspace, a new one begins.
    """
    steps = min(size, LANCZOS_STEPS)
    draws = jax.random.normal(jax.random.key(0), (steps, size), dtype)
    tiny = jnp.finfo(dtype).tiny

    def orthogonal(vector: Flat, basis: Float[Array, "steps dim_y"]) -> Flat:
        for _ in range(2):
            vector = vector - basis.T @ (basis @ vector)
        return vector

    def step(k: Count, state: _Lanczos) -> _Lanczos:
        basis, diagonal, beside, vector = state
        basis = basis.at[k].set(vector)
        image = product(vector)
        rest = orthogonal(image, basis)
        length = norm(rest)
        ends = length <= 10 * jnp.finfo(dtype).eps * norm(image)
        fresh = orthogonal(draws[jnp.minimum(k + 1, steps - 1)], basis)
        following = jnp.where(ends, fresh, rest)
        following = following / jnp.maximum(norm(following), tiny)
        diagonal = diagonal.at[k].set(jnp.sum(vector * image))
        return basis, diagonal, beside.at[k].set(jnp.where(ends, 0, length)), following

    zeros = jnp.zeros((steps,), dtype)
    start = jnp.zeros((steps, size), dtype), zeros, zeros, draws[0] / norm(draws[0])
    _, diagonal, beside, _ = jax.lax.fori_loop(0, steps, step, start)
    between = jnp.diag(beside[:-1], 1)
    ritz = jnp.linalg.eigvalsh(jnp.diag(diagonal) + between + between.T)
    return ritz[0], ritz[-1]


def norm(tree: PyTree) -> Scalar:
    """The Euclidean norm of all numbers of a pytree, in the widest of their dtypes."""
    leaves = jax.tree.leaves(tree)
    wide = max((leaf.dtype for leaf in leaves), key=lambda dtype: jnp.finfo(dtype).bits)
    return jnp.sqrt(sum(jnp.sum(leaf.astype(wide) ** 2) for leaf in leaves))


def rounding(dtype: np.dtype | type, power: float) -> float:
    """eps ** power; power 0.75 (1.8e-12 in float64, 6.4e-6 in float32) leaves room for long sums."""
    return float(jnp.finfo(dtype).eps) ** power
