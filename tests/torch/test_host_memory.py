"""What a run of a problem in torch takes of memory: the rows once, and nothing of torch's compiler."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

import fedbilevel as fb
import fedbilevel.torch as ft
from fedbilevel.torch.host import Numbers

SCRIPT = """
    import sys
    from pathlib import Path

    import jax, torch
    import fedbilevel as fb
    import fedbilevel.torch as ft

    torch.set_num_threads(1)
    whole, batch = sys.argv[1] == "int32", int(sys.argv[2]) or None
    peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    few, many = ([torch.ones(n, 500).to(torch.int32 if whole else torch.float32) for _ in range(10)] for n in (10, 10_000))
    data = fb.FederatedData.stack(many, few)
    del many  # 190 MB
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(500, 1))
    model = ft.Model(module)
    look_up = lambda y, rows: y["table"][rows].mean(1, keepdim=True)
    each = lambda y, rows: ((look_up if whole else model)(y, rows) - 1)[:, 0] ** 2
    inner = lambda x, y, rows, w: (w * each(y, rows)).sum() + torch.exp(x) * sum((leaf**2).sum() for leaf in y.values())
    outer = lambda x, y, rows, w: (w * each(y, rows)).sum()
    y = {"table": torch.zeros(10)} if whole else model.parameters()
    algorithm = fb.Lockstep(inner_lr=1e-3, outer_lr=1e-3, hessian_lr=1e-3, batch_size=batch)
    fb.solve(ft.Problem(inner, outer), data, algorithm, torch.tensor(-1.0), y, 3, key=jax.random.key(0))
    print(peak() - before, "sympy" in sys.modules, "torch._dynamo" in sys.modules)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of memory")
@pytest.mark.parametrize(("kind", "batch"), [("float32", 0), ("float32", 32), ("int32", 32)])
def test_rounds_copy_no_rows_and_import_nothing_large(kind: str, batch: int):
    words = [sys.executable, "-c", textwrap.dedent(SCRIPT), kind, str(batch)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    grown, *imported = done.stdout.split()
    assert imported == ["False", "False"]
    assert float(grown) < 150  # about 90, of rows of 190


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int32, np.uint8, np.bool_])
def test_rows_lie_where_the_data_has_them(kind: type):
    rows = [np.ones((5, 3), kind), np.ones((4, 3), kind)]
    data = fb.FederatedData.stack(rows, rows)
    problem = ft.Problem(lambda x, y, rows, w: x * y, lambda x, y, rows, w: x * y)
    bound, standing = problem.holding(data)
    for level, stored in zip((data.inner, data.outer), bound.host._levels, strict=True):
        assert stored.leaves[0].data_ptr() == level.rows.unsafe_buffer_pointer()
    assert isinstance(standing.inner.rows, Numbers)
    batch = bound.host._levels[1].batch(np.asarray(standing.outer.rows.number)[2:6])
    assert torch.equal(batch, torch.ones(4, 3, dtype=batch.dtype))
    assert batch.dtype is (torch.int64 if kind is np.int32 else stored.leaves[0].dtype)
    assert jax.tree.leaves(standing.inner.rows)[0].shape == (9,)
