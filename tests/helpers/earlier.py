"""Runs whose checkpoints an earlier version wrote (format 2), so that today's goes on with them.

`python -m helpers.earlier FOLDER`, in tests/ of that version with this file put there, writes them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import fedbilevel as fb
from fedbilevel.callbacks import Checkpoint

STEPS = {"inner_lr": 0.1, "outer_lr": 0.05, "local_steps": 2}
RUNS = {  # x is like y, so that an order mistaken for another would not be noticed by shapes
    "lockstep": fb.Lockstep(hessian_lr="auto", **STEPS),
    "aggitd": fb.AggITD(
        one_round=True, warm_start_v=True, truncation="full", outer_optimizer="adam:0.05", hessian_lr=0.01, **STEPS
    ),
    "fedmsa": fb.FedMSA(hessian_lr=0.01, **STEPS),
    "fedf2sa": fb.FedF2SA(**STEPS),
    "adafbio": fb.AdaFBiO(hessian_lr="auto", **STEPS),
}
AUTOMATIC = ("lockstep", "adafbio")  # whose steps were found in another way then
HALF, WHOLE = 3, 6


def solve(name: str, iterations: int = WHOLE, **options) -> fb.Result:
    """So many iterations of a run; three ragged clients."""
    draw = lambda seed, *shape: np.random.default_rng(seed).normal(size=shape)  # the same to the bit wherever it runs
    inner = [{"a": draw(i, 3 + i, 2), "b": draw(10 + i, 3 + i)} for i in range(3)]
    outer = [{"a": draw(20 + i, 2 + i, 2), "b": draw(30 + i, 2 + i)} for i in range(3)]
    problem = fb.Problem(
        lambda x, y, row: 0.5 * (row["a"] @ y - row["b"]) ** 2 + 0.5 * jnp.sum(jnp.exp(x) * y**2),
        lambda x, y, row: 0.5 * (row["a"] @ y - row["b"]) ** 2,
    )
    data = fb.FederatedData.stack(inner, outer)
    x, y = jnp.zeros(2), jnp.zeros(2)
    return fb.solve(problem, data, RUNS[name], x, y, iterations, key=jax.random.key(5), check=False, **options)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    for name in RUNS:
        solve(name, HALF, callbacks=[Checkpoint(Path(sys.argv[1]) / name)])
