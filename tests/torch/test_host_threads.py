"""Torch's threads and XLA's: no deadlock, whatever the number of cores and the size of arrays."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
    import os, sys
    cores, threads = int(sys.argv[1]), int(sys.argv[2])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import jax, torch
    torch.set_num_threads(threads)
    torch.ones(2000, 2000) @ torch.ones(2000, 2000)  # the caller's thread has its own workers
    import fedbilevel as fb
    import fedbilevel.torch as ft

    LARGE = 8 * 2**20  # numbers: 32 MB
    rows = [torch.full((3, 4), float(k)) for k in range(3)]
    data = fb.FederatedData.stack(rows, rows)
    each = lambda y, batch, weights: (weights * ((y["w"][:4] - batch) ** 2).sum(1)).sum()
    inner = lambda x, y, batch, weights: each(y, batch, weights) + torch.exp(x["p"]) * (y["w"] ** 2).sum()
    outer = lambda x, y, batch, weights: each(y, batch, weights)
    x, y = {"p": torch.tensor(-1.0)}, {"w": torch.zeros(LARGE)}
    algorithm = fb.SimFBO(inner_lr=0.1, hessian_lr=0.1, outer_lr=0.1, local_steps=2)
    result = fb.solve(ft.Problem(inner, outer), data, algorithm, x, y, 2, key=jax.random.key(0), check=False)
    print("x", float(result.x["p"]), float(result.y["w"].sum()))
"""


@pytest.mark.parametrize(("cores", "threads"), [(1, 2), (2, 2)])
def test_arrays_of_32_mb(cores: int, threads: int):
    if cores > (os.cpu_count() or 1):
        pytest.skip("there are not so many cores")
    words = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(cores), str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    x, total = map(float, done.stdout.split()[-2:])
    assert x != -1.0 and total > 0
