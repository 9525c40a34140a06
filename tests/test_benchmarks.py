"""Every benchmark runs: small, with --quick; and prints a table with numbers in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.places import ROOT

SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
# they need data, or hours: what they measure stands in docs/benchmarks.md
LARGE = {"fednest_settings", "search_settings"}
QUICK = [script for script in SCRIPTS if script.stem not in LARGE]


@pytest.mark.slow  # each compiles, in a process of its own
@pytest.mark.parametrize("script", QUICK, ids=lambda script: script.stem)
def test_a_benchmark_runs(script, tmp_path):
    if script.stem == "network":
        pytest.importorskip("nvflare")
    done = subprocess.run(
        [sys.executable, str(script), "--quick"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = [line for line in done.stdout.splitlines() if len(re.findall(r"\b\d+\.\d+\b", line)) >= 2]
    assert numbers, done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_each_says_what_it_measures_and_how_it_is_run(script: Path):
    text = script.read_text()
    assert f"python benchmarks/{script.name}" in text.split('"""')[1]
    assert ("--quick" in text) == (script in QUICK)
