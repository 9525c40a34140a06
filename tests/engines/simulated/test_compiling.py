"""A run is compiled quickly or in full, once, by what is sooner done; and is another run in the other way."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.engines.simulated import compiling
from fedbilevel.errors import InputError

DRAW = np.random.default_rng(0)
ROWS = [DRAW.normal(size=(n, 3)).astype("f") for n in (4, 2, 5)]
PROBLEM = fb.Problem(
    lambda x, y, row: jnp.sum((jnp.tanh(y) - x * row) ** 2), lambda x, y, row: jnp.sum((y * row - 1) ** 2)
)
LOCKSTEP = fb.algorithms.Lockstep(outer_lr=0.01, inner_lr=0.01, hessian_lr=0.01)
X = Y = np.full(3, 0.5, "f")


def solve(iterations=3, compile="auto", **more):
    engine = fb.Simulation(cohort=2, compile=compile)
    with jax.enable_x64(False):
        data = fb.FederatedData.stack(ROWS, ROWS)
        key = jax.random.key(0)
        return fb.solve(PROBLEM, data, LOCKSTEP, X, Y, iterations, key=key, engine=engine, **more)


@pytest.fixture
def slow_iterations(monkeypatch):
    """As if each iteration took a second."""
    measured = []

    def pace(self, *_):
        measured.append(1)
        return 1.0

    monkeypatch.setattr(fb.engines.simulation._Simulated, "_pace", pace)
    monkeypatch.setattr(compiling, "_PACES", compiling.Kept(4))
    return measured


def test_a_short_run_is_compiled_quickly_and_goes_where_the_full_one_goes():
    quick, full = solve(), solve(compile="full")
    assert (quick.compiled, full.compiled) == ("quick", "full")
    np.testing.assert_allclose(quick.x, full.x, rtol=1e-6)
    assert [row["rounds"] for row in quick.history] == [row["rounds"] for row in full.history]
    np.testing.assert_array_equal(quick.x, solve(compile="quick").x)  # the iteration that was measured is the first


def test_where_iterations_take_long_it_is_compiled_in_full(slow_iterations):
    assert solve(1).compiled == "quick"  # nothing to save
    assert not slow_iterations
    assert [solve(n).compiled for n in (2, 3, 2)] == ["quick", "full", "quick"]
    assert len(slow_iterations) == 1  # runs alike choose alike
    np.testing.assert_array_equal(solve(3).x, solve(3, "full").x)


def test_in_64_bits_it_is_full():
    data = fb.FederatedData.stack(ROWS, ROWS)
    result = fb.solve(PROBLEM, data, LOCKSTEP, X, Y, 1, key=jax.random.key(0), engine=fb.Simulation(cohort=2))
    assert result.compiled == "full"


def test_a_run_that_goes_on_is_compiled_as_it_was(slow_iterations, tmp_path):
    whole = solve(2)
    for compile in ("auto", "quick"):
        solve(1, callbacks=[fb.callbacks.Checkpoint(tmp_path)])
        gone_on = solve(2, compile, resume=tmp_path)
        assert gone_on.compiled == "quick"
        np.testing.assert_array_equal(gone_on.x, whole.x)
    long = solve(4, callbacks=[fb.callbacks.Checkpoint(tmp_path)])
    assert long.compiled == "full"
    assert solve(5, resume=tmp_path).compiled == "full"
    with pytest.raises(InputError, match="compile was 'full' and is 'quick'"):
        solve(5, "quick", resume=tmp_path)


def test_a_checkpoint_of_before_is_a_full_one(monkeypatch, tmp_path):
    solve(1, "full", callbacks=[fb.callbacks.Checkpoint(tmp_path)])
    file = tmp_path / "checkpoint.eqx"
    file.write_bytes(file.read_bytes().replace(b'"compile": "full", ', b""))
    assert solve(2, resume=tmp_path).compiled == "full"


@pytest.mark.parametrize("compile", ["fast", None, True])
def test_other_words_are_refused(compile):
    with pytest.raises(InputError, match="compile= is 'auto', 'quick' or 'full'; got"):
        fb.Simulation(compile=compile)


def test_quick_is_for_cpus(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(InputError, match="for CPUs"):
        fb.Simulation(compile="quick")
    assert dataclasses.asdict(fb.Simulation())["compile"] == "auto"
