"""An app in PyTorch over nvflare is its simulation, in nvflare's simulator and provisioned; a site that lacks torch."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("nvflare")

from helpers.network import call, close, lines

APP = """
{before}
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import fedbilevel as fb
import fedbilevel.torch as ft

torch.manual_seed(0)
model = ft.Model(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)))


def inner(x, y, batch, weights):
    inputs, label = batch
    each = F.cross_entropy(model(y, inputs), label, reduction="none")
    decay = sum((leaf**2).sum() for leaf in y.values())
    return (weights * torch.exp(x["weights"])[label] * each).sum() + torch.exp(x["penalty"]) * decay


def outer(x, y, batch, weights):
    inputs, label = batch
    return (weights * F.cross_entropy(model(y, inputs), label, reduction="none")).sum()


def load(site):
    draw = np.random.default_rng(sum(map(ord, site)))
    labelled = lambda n: (draw.standard_normal((n, 6), np.float32), draw.integers(0, 3, n))
    rows = lambda n: TensorDataset(*map(torch.from_numpy, labelled(n)))
    count = 6 + int(site[-1])
    return rows(count), rows(count + 2)


def accuracy(x, y):
    inputs, label = load("site-1")[1].tensors
    return float((model(y, inputs).argmax(1) == label).float().mean())


def right(x, y, batch, weights):
    inputs, label = batch
    return (weights * (model(y, inputs).argmax(1) == label)).sum()


app = fb.App(
    client_metrics={{"right": right}}, share_metrics=True,
    problem=ft.Problem(inner, outer), load=load, metrics={{"accuracy": accuracy}}, keep="accuracy:max",
    start=lambda: ({{"weights": torch.zeros(3), "penalty": torch.tensor(-3.0)}}, model.parameters()), {settings},
)
"""
pytestmark = pytest.mark.network
STEPS = "inner_lr=0.1, outer_lr=0.1"
ALGORITHMS = {
    "lockstep": "fb.Lockstep(batch_size=4)",
    "aggitd": f"fb.AggITD({STEPS}, hessian_lr=0.1, inner_rounds=2, local_steps=2)",
    "fedf2sa": f"fb.FedF2SA({STEPS}, local_steps=2)",
}


def written(folder, algorithm: str, before: str = ""):
    file = folder / "app.py"
    file.write_text(APP.format(before=before, settings=f"algorithm={ALGORITHMS[algorithm]}, iterations=4, cohort=2"))
    return file


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_is_its_simulation(algorithm, tmp_path):
    file = written(tmp_path, algorithm)
    out, simulated = tmp_path / "network", tmp_path / "simulated"
    call("run", file, "--engine", "nvflare", "--clients", 3, "--out", out, *["--poc"] * (algorithm == "lockstep"))
    call("run", file, "--clients", 3, "--out", simulated)
    close(out, simulated, 1e-5)
    fares = [
        {line["client"]: float(line["right"]) for line in lines(place / "clients.csv")} for place in (out, simulated)
    ]
    assert fares[0] == pytest.approx(fares[1], rel=1e-6) and len(fares[0]) == 3
    for name in ("rounds", "bytes_down", "bytes_up"):
        assert [one[name] for one in lines(out / "history.csv")] == [
            one[name] for one in lines(simulated / "history.csv")
        ]


def test_a_site_without_torch_is_named(tmp_path):
    lacking = """
import multiprocessing
import sys

if multiprocessing.current_process().name.endswith("site-2"):
    sys.modules["torch"] = None  # there is none
"""
    file = written(tmp_path, "lockstep", lacking)
    told = call("run", file, "--engine", "nvflare", "--clients", 3, "--out", tmp_path / "out", code=2)
    assert re.search(r"site-2: .*app.py failed: .*torch.*Install it", told)
