"""One text, several engines: simulation, loopback and a mesh of devices agree to 1e-12 and count the same."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import optax.tree
import pytest

import fedbilevel as fb
from fedbilevel.cohorts import combine_replies
from helpers import cases
from helpers.cases import CASES, OneRound
from helpers.parts import Careful
from helpers.places import ROOT, TESTS
from helpers.quadratic import flat, quadratic

AGREE = 1e-12
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def simulated():
    """Each case's run in simulation, compiled when it is first asked for."""
    done: dict[Any, Any] = {}

    def get(name, cohort=4):
        if (name, cohort) not in done:
            done[name, cohort] = cases.run(name, fb.Simulation(cohort))
        return done[name, cohort]

    return get


def agree(one, other):
    np.testing.assert_allclose(one[0], other[0], rtol=0, atol=AGREE * np.maximum(1, np.abs(other[0])).max())
    np.testing.assert_array_equal(one[1], other[1])


FIRST = ("aggitd", "fednest", "lockstep", "one-round", "fedbioacc-local")
EACH = [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", EACH)
def test_loopback_is_the_simulation(simulated, name):
    expected = simulated(name)
    looped = cases.run(name, fb.Loopback(cohort=4, shuffle=5))
    agree(looped, expected)
    with pytest.raises(AssertionError):  # other keys, other rows and cohorts: what is compared depends on them
        np.testing.assert_allclose(cases.run(name, fb.Simulation(cohort=4), seed=1)[0], expected[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("group", ["first", pytest.param("others", marks=pytest.mark.slow)])
def test_four_devices_are_one(group, simulated, tmp_path):
    path = tmp_path / "mesh.npz"
    faster = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # to compile
    flags = f"--xla_force_host_platform_device_count=4 {faster}"
    source = str(ROOT / "src")
    path_of_it = f"{source}{os.pathsep}{TESTS}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path_of_it}
    command = [sys.executable, "-m", "helpers.cases", str(path), group]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    with np.load(path) as file:
        mesh = dict(file)
    assert mesh["devices"] == 4
    for name, cohort in cases.ON_DEVICES[group]:
        agree((mesh[f"{name}/{cohort}/numbers"], mesh[f"{name}/{cohort}/ledger"]), simulated(name, cohort))


def test_clients_in_batches_are_all_at_once(simulated):
    agree(cases.run("one-round", fb.Simulation(cohort=4, client_batch=3)), simulated("one-round"))


# The conformance suite ------------------------------------------------------------------------------------------------


def test_the_conformance_suite_passes_the_stateful_algorithm():
    report = fb.testing.check_algorithm(OneRound(batch_size=2))
    assert report.passed and len(report.lines) >= 6


def test_the_conformance_suite_has_clients_drop_out_where_parts_are_combined_each_in_its_way():
    report = fb.testing.check_algorithm(Careful(batch_size=2))
    assert "means and maxima of those who answer" in [what for what, _, _ in report.lines]


@pytest.mark.slow
def test_the_conformance_suite_finds_an_engine_that_asks_those_who_dropped_out(monkeypatch):
    """A maximum over the whole cohort: nothing but dropouts shows it."""

    def spoilt(how, replies, weights, present=None):
        return combine_replies(how, replies, weights, present if how == "mean" else None)

    monkeypatch.setattr(fb.engines.simulated.federation, "combine_replies", spoilt)
    with pytest.raises(fb.testing.CheckFailed, match="FAILED means and maxima of those") as failed:
        fb.testing.check_algorithm(Careful(batch_size=3))  # not compiled yet
    assert str(failed.value).count("FAILED") == 1


class Padded(fb.Algorithm):
    """Wrong on purpose: its step depends on how the client's rows are padded, which differs between engines."""

    lr: Any = fb.rate(0.01)

    def step(self, fed, state):
        g = fed.average(self.gradient, state.x, state.y)
        return fb.State(state.x, optax.tree.add_scale(state.y, -self.lr, g)), {}

    def gradient(self, client, x, y):
        return optax.tree.scale(len(client.inner.weights) / 6, client.problem.inner_gradient(x, y, client.inner))


def test_the_conformance_suite_finds_an_algorithm_that_sees_padding():
    with pytest.raises(fb.testing.CheckFailed, match="FAILED loopback = simulation"):
        fb.testing.check_algorithm(Padded())


# Client state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stalling", [False, True])
def test_control_variates_reach_the_solution_with_3_of_8_clients(stalling):
    q = quadratic(seed=2, clients=8)
    curvature = np.linalg.eigvalsh(q.hessians(q.t)).max()
    algorithm = OneRound(inner_lr=0.2 / curvature, local_steps=2, stalling=stalling)
    options = {"key": KEY, "engine": fb.Simulation(cohort=3), "evaluate_every": 4000}
    result = fb.solve(q.problem, q.data, algorithm, q.x, q.y, 4000, **options)
    off = np.linalg.norm(flat(result.y) - q.solution(q.t)) / np.linalg.norm(q.solution(q.t))
    assert off > 1e-3 if stalling else off < 1e-11
