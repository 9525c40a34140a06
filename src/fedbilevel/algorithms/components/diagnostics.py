"""What iterations tell of themselves, from what travels anyway; and which setting moves which part of a state."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from ...algorithm import Algorithm
from .steps import growth

Scalar = Float[Array, ""]


def of_each(*names: str) -> dict[str, str]:
    """`Algorithm.follows` of parts that are made like (x, y, v)."""
    return {f"{name}.{k}": Algorithm.follows[part] for name in names for k, part in enumerate(("x", "y", "v"))}


def residual(pull: Scalar, now: Scalar, first: Scalar | None = None) -> tuple[Scalar, Scalar]:
    """(|H v - d_y f| against |d_y f|, the latter) from the former.

    |d_y f| is known in the first iteration, where v = 0 and `pull` is zero: it is `first`, or `now`.
    """
    known = jnp.where(pull > 0, pull, now if first is None else first).astype(pull.dtype)
    return growth(now, known), known
