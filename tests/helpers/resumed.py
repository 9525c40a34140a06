"""A run that is saved and resumed, with new functions each time."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import fedbilevel as fb

RNG = np.random.default_rng(0)
ROWS = [RNG.normal(size=(n, 3)) + i for i, n in enumerate((3, 3, 3))]
DATA = fb.FederatedData.stack(ROWS, ROWS)
X, Y = {"a": jnp.ones(2)}, {"b": jnp.zeros(3)}
STEPS = {"inner_lr": 0.1, "hessian_lr": 0.1, "outer_lr": 0.05}
NEST = fb.FedNest(inner_rounds=1, **STEPS)


def losses(pull=1.0, slope=0.2):
    """New functions each time."""
    wanted = np.full(3, pull)
    inner = lambda x, y, e: 0.5 * jnp.sum((y["b"] - e) ** 2) + slope * jnp.sum(x["a"]) * jnp.sum(y["b"])
    outer = lambda x, y, e: 0.5 * jnp.sum((y["b"] - wanted) ** 2) + 0.5 * jnp.sum(x["a"] ** 2)
    return fb.Problem(inner, outer)


def solve(iterations=3, problem=None, **changed):
    given = {"data": DATA, "algorithm": NEST, "x": X, "y": Y, "key": jax.random.key(0), "check": False} | changed
    return fb.solve(problem or losses(), iterations=iterations, **given)


def with_optimizer(optimizer):
    return {"algorithm": dataclasses.replace(NEST, outer_optimizer=optimizer)}
