"""A problem with leaves that belong to clients in x and in y, and common ones beside them."""

from __future__ import annotations

import jax.numpy as jnp

M, WIDE, OWN = 4, 3, 2
STEPS = {"inner_lr": 0.05, "hessian_lr": 0.05, "outer_lr": 0.05}


def inner(x, y, row):
    """A shared part and a head of each client's own, pulled to an x that has both kinds of leaves too."""
    error = row["a"] @ y["body"] + row["a"][:OWN] @ y["head"] - row["b"]
    pulled = jnp.sum((y["head"] - x["own"]) ** 2) + jnp.sum((y["body"] - x["all"]) ** 2)
    return 0.5 * error**2 + 0.5 * pulled


def outer(x, y, row):
    error = row["a"] @ y["body"] + row["a"][:OWN] @ y["head"] - row["b"]
    return 0.5 * error**2 + 0.1 * (jnp.sum(x["own"] ** 2) + x["all"] ** 2)
