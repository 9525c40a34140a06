"""What is told of an installation, and that its test finds a broken one."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel import doctor
from fedbilevel.tasks.quadratic import quadratic
from helpers.users import as_users_do


def test_facts_name_versions_devices_cache_and_extras(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={tmp_path}/dump")
    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    told = {each.name: each.value for each in doctor.facts()}
    assert told["fedbilevel"] == fb.__version__ and told["jax"] == jax.__version__
    assert told["devices"].endswith("x cpu (cpu)") and told["XLA_FLAGS"] == "--xla_dump_to=~/dump"
    assert told["nvflare"] == "not installed: pip install 'fedbilevel[nvflare]'"
    assert told["numpy"] == "1.2" and "compiled programs" in told and "polars" not in told


def version(name):
    if name in ("nvflare", "polars"):
        raise doctor.importlib.metadata.PackageNotFoundError(name)
    return "1.2"


def test_the_closed_form_is_one():
    task = quadratic(clients=doctor.CLIENTS, seed=0)
    exact = doctor._exact(task)
    x = np.asarray(task.x, float)
    expected = np.asarray(fb.reference.hypergradient(task.problem, task.data, task.x, task.y))
    np.testing.assert_allclose(exact.hypergradient(x), expected, rtol=1e-8)
    assert np.abs(exact.hypergradient(exact.optimum())).max() < 1e-12


@pytest.mark.parametrize("wide", [False, True])
def test_all_pass_here(wide):
    with jax.enable_x64(True) if wide else as_users_do():
        done = list(doctor.tests())
    assert len(done) >= 3 and all(each.passed for each in done), done


def test_a_broken_installation_is_told(monkeypatch):
    wrong = lambda *given, **more: jax.numpy.ones(4)
    monkeypatch.setattr(doctor.reference, "hypergradient", wrong)

    def fails(*given, **more):
        raise RuntimeError("no such device\nmore")

    monkeypatch.setattr(doctor, "solve", fails)
    first, second, third, *_ = doctor.tests()
    assert not first.passed and first.seen.startswith("off by")
    assert (second.passed, second.seen) == (third.passed, third.seen) == (False, "RuntimeError: no such device")
