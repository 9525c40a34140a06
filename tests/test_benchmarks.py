"""Every benchmark runs: small, with --quick; and prints a table with numbers in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.places import DATA, ROOT

SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.slow  # each compiles, in a process of its own
@pytest.mark.parametrize(
    "script",
    [pytest.param(script, marks=[pytest.mark.torch] * script.stem.startswith("torch")) for script in SCRIPTS],
    ids=lambda script: script.stem,
)
def test_a_benchmark_runs(script, tmp_path):
    if script.stem == "network":
        pytest.importorskip("nvflare")
    data = []
    if script.stem == "fednest_settings":
        if not DATA.is_dir():
            pytest.skip("MNIST is not there")
        data = ["--data-dir", str(DATA)]
    words = [sys.executable, str(script), "--quick", *data]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = [line for line in done.stdout.splitlines() if len(re.findall(r"\b\d+\.\d+\b", line)) >= 2]
    assert numbers, done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_each_says_what_it_measures_and_how_it_is_run(script: Path):
    text = script.read_text()
    assert f"python benchmarks/{script.name}" in text.split('"""')[1]
    assert "--quick" in text
