"""The examples run as they stand, and keep the promises that the guide makes of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fedbilevel as fb
from helpers.places import EXAMPLES

RIDGE = EXAMPLES / "neumann_ridge.py"


def run(file: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(file)], cwd=folder, capture_output=True, text=True, timeout=600)


def test_an_algorithm_of_ones_own_takes_less_than_60_lines(tmp_path):
    assert len(RIDGE.read_text().splitlines()) < 60
    done = run(RIDGE, tmp_path)
    assert done.returncode == 0, done.stderr
    for sentence in ("estimates the hypergradient", "hypergradient  x, y, v", "the two engines differ by"):
        assert sentence in done.stdout


def test_a_method_from_components_takes_less_than_40_lines_and_conforms(monkeypatch):
    assert len((EXAMPLES / "warm_nest.py").read_text().splitlines()) < 40
    monkeypatch.syspath_prepend(EXAMPLES)
    from warm_nest import WarmNest

    task = fb.tasks.quadratic(clients=3)
    protocol = fb.protocol(WarmNest(inner_rounds=4), task.problem, task.data, task.x, task.y)
    assert protocol.rounds == 3 * 4 + 3
    assert fb.testing.check_algorithm(WarmNest(), accurate=WarmNest(inner_rounds=500)).passed


@pytest.mark.slow
def test_a_wrong_sign_in_it_is_found(tmp_path):
    wrong = tmp_path / "wrong.py"
    right = "optax.tree.sub(direct,"
    assert right in RIDGE.read_text()
    wrong.write_text(RIDGE.read_text().replace(right, "optax.tree.add(direct,"))
    done = run(wrong, tmp_path)
    assert done.returncode != 0
    assert "FAILED estimates the hypergradient" in done.stderr


def test_the_skeleton_conforms_but_its_hypergradient_is_crude(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from skeleton import Skeleton

    with pytest.raises(fb.testing.CheckFailed) as caught:
        fb.testing.check_algorithm(Skeleton(), accurate=Skeleton(inner_rounds=500))
    assert [what for what, good, _ in caught.value.report.lines if not good] == ["estimates the hypergradient"]
