"""A task of few numbers, for counting rounds and bytes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

import fedbilevel as fb

DX, DY, CLIENTS, COHORT = 2, 3, 4, 3
COLUMNS = ("rounds", "bytes_down", "bytes_up")


@functools.cache
def task(dtype=np.float64):
    """(problem, data, x, y): x has DX numbers and y DY."""
    rows = [np.full((2, DY), i, dtype) for i in range(CLIENTS)]
    y = {"a": jnp.zeros(DY - 1, dtype), "b": {"c": jnp.zeros((), dtype)}}

    def loss(x, y, e):
        y = jnp.append(y["a"], y["b"]["c"])
        return 0.5 * jnp.sum((y - e) ** 2) + 0.1 * (jnp.sum(x) * jnp.sum(y) + jnp.sum(x**2))

    return fb.Problem(loss, loss), fb.FederatedData.stack(rows, rows), jnp.zeros(DX, dtype), y


def ledger(algorithm, engine, iterations, dtype=np.float64):
    """(iterations, 3): what each iteration cost."""
    problem, data, x, y = task(dtype)
    history = fb.solve(problem, data, algorithm, x, y, iterations, key=jax.random.key(0), engine=engine).history
    return np.diff(np.stack([history.column(name) for name in COLUMNS], axis=1).astype(np.int64), axis=0)
