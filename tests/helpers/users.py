"""What users have: JAX's standard promotion of dtypes and ranks, and 32 bits if they do not ask for more."""

from __future__ import annotations

import contextlib

import jax


@contextlib.contextmanager
def as_users_do(bits: int = 32):
    promote = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with jax.enable_x64(bits == 64), promote[0], promote[1]:
        yield
