"""The largest curvature by a few Lanczos steps on a pytree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Float, Int, PyTree

STEPS = 5  # of Lanczos; also the rounds of a measurement


def krylov(like: PyTree) -> dict[str, PyTree]:
    """A start of `STEPS` Lanczos steps: a fixed random direction, and the tridiagonal matrix still empty."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    v = jax.tree.unflatten(structure, draw)
    size = optax.tree.norm(v)
    zeros = jnp.zeros((STEPS,), size.dtype)
    return {
        "v": optax.tree.scale(1 / size, v), "before": optax.tree.zeros_like(v),
        "diagonal": zeros, "beside": zeros, "beta": jnp.zeros_like(size),
    }  # fmt: skip


def extend(t: int | Int[Array, ""], basis: dict[str, PyTree], product: PyTree) -> dict[str, PyTree]:
    """One Lanczos step, given the product of the matrix with `basis["v"]`; an exhausted space goes on with zeros."""
    v = basis["v"]
    alpha = jnp.asarray(optax.tree.vdot(v, product))
    rest = optax.tree.add_scale(optax.tree.add_scale(product, -alpha, v), -basis["beta"], basis["before"])
    beta = optax.tree.norm(rest)
    alive = beta > 1e-6 * jnp.maximum(jnp.abs(alpha), basis["beta"])
    beta = jnp.where(alive, beta, jnp.zeros_like(beta))
    following = optax.tree.scale(jnp.where(alive, 1 / jnp.where(alive, beta, 1), jnp.zeros_like(beta)), rest)
    return {
        "v": following, "before": v,
        "diagonal": basis["diagonal"].at[t].set(alpha), "beside": basis["beside"].at[t].set(beta), "beta": beta,
    }  # fmt: skip


def largest_ritz_value(basis: dict[str, PyTree]) -> Float[Array, ""]:
    """The largest eigenvalue, in absolute value, of the tridiagonal matrix."""
    beside = basis["beside"][:-1]
    matrix = jnp.diag(basis["diagonal"]) + jnp.diag(beside, 1) + jnp.diag(beside, -1)
    half = jnp.finfo(matrix.dtype).bits < 32  # no eigenvalues in half precision
    wide = matrix.astype(jnp.float32) if half else matrix
    return jnp.max(jnp.abs(jnp.linalg.eigvalsh(wide))).astype(matrix.dtype)
