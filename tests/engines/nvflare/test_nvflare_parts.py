"""Over the network: an app of several files travels whole, sites that differ are refused, each keeps what is its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.app import load_app
from helpers import apps
from helpers.app_of_files import write
from helpers.network import call, close, nothing_left, numbers

pytest.importorskip("nvflare")
from fedbilevel.engines.nvflare.job import export

pytestmark = pytest.mark.network


def submitted(job: Path, out: Path, clients: int, poc: bool) -> tuple[dict, Path]:
    """What became of a job, and where its results are: in the server's workspace."""
    out.mkdir()
    told = json.dumps({"job": str(job), "out": str(out), "clients": clients, "poc": poc})
    with (out / "log").open("w") as log:
        words = [sys.executable, "-m", "fedbilevel.engines.nvflare.launch", told]
        subprocess.run(words, stdout=log, stderr=log, timeout=400, check=False)
    (found,) = out.rglob("outcome.json")
    return json.loads(found.read_text()), found.parent


def test_a_job_runs_where_nothing_of_the_app_lies(tmp_path):
    file = write(tmp_path / "app")
    call("run", file, "--out", tmp_path / "simulated", "--clients", 2)
    job = export(file, tmp_path / "jobs", {}, 2)
    shutil.rmtree(tmp_path / "app")
    outcome, folder = submitted(job, tmp_path / "network", 2, poc=True)
    assert outcome["status"] == "done", outcome
    close(folder, tmp_path / "simulated", 1e-12)
    nothing_left(tmp_path)


def test_a_site_with_another_module_is_named_with_it(tmp_path):
    job = export(write(tmp_path / "app"), tmp_path / "jobs", {}, 2)
    shutil.copytree(job / "app", job / "other")
    (job / "other" / "custom" / "models" / "parts" / "bits.py").write_text("BIT = 2\n")
    meta = json.loads((job / "meta.json").read_text())
    meta["deploy_map"] = {"app": ["server", "site-1"], "other": ["site-2"]}
    (job / "meta.json").write_text(json.dumps(meta))
    outcome, _ = submitted(job, tmp_path / "network", 2, poc=False)
    assert outcome["status"] == "refused"
    assert "site site-2 does not run the server's app: it has another models/parts/bits.py" in outcome["sentence"]


def test_each_site_keeps_its_own_lower_variable(tmp_path):
    settings = "iterations=6, algorithm=fb.FedBiOAccLocal(inner_lr=0.02, outer_lr=0.02)"
    file = apps.write(tmp_path, apps.CLOSED_FORM, settings)
    app, names = load_app(file), ["site-1", "site-2", "site-3"]
    printed = call("run", file, "--out", tmp_path / "out", "--engine", "nvflare")
    result = fb.solve(app.problem, app.data(names), app.algorithm, *app.begin(), 6, key=app.key)
    for name, own in zip(names, result.clients_y, strict=True):
        with np.load(tmp_path / "out" / "sites" / "closed-form" / name / "lower.npz") as kept:
            np.testing.assert_allclose(kept["y"], own, rtol=1e-12)
    np.testing.assert_allclose(numbers(tmp_path / "out"), result.x, rtol=1e-12)  # no y beside it
    assert "share_lower=True" in printed  # the warning came all the way
    nothing_left(tmp_path)
