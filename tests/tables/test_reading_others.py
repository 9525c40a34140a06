"""Tables of polars, pyarrow, Hugging Face's datasets and flwr-datasets, in an environment of their own: none of them is
among what the tests need, and what they need beside clashes with it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers.places import ROOT, TESTS

PINS = ["datasets==4.8.5", "flwr-datasets==0.6.1", "polars==2.1.0"]  # pyarrow comes with our own extra


def run(*words, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XLA_", "JAX_"))}
    return subprocess.run(
        list(map(str, words)), env={**clean, **environment}, capture_output=True, text=True, timeout=1800, check=False
    )


@pytest.mark.slow
def test_tables_of_other_libraries_are_the_rows_that_pandas_are(tmp_path):
    assert run(sys.executable, "-m", "venv", tmp_path / "own").returncode == 0
    python = tmp_path / "own" / "bin" / "python"
    pip = (python, "-m", "pip", "--disable-pip-version-check", "--quiet")
    there = run(*pip, "download", "--no-deps", "--dest", tmp_path, PINS[1])
    if there.returncode:
        pytest.skip(f"no index of packages can be reached: {there.stderr.strip().splitlines()[-1]}")
    installed = run(*pip, "install", f"{ROOT}[tables]", *PINS)
    assert installed.returncode == 0, installed.stderr[-3000:]
    out = tmp_path / "out"
    out.mkdir()
    done = run(python, TESTS / "helpers" / "others_tables.py", out, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "all of them"
