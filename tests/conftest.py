"""Tests run in float64, with the strictest rules JAX has on shapes and dtypes."""

import sys
from pathlib import Path

import jax
import pytest

from fedbilevel import cli
from fedbilevel.experiments.search import release

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


MAPS, ENOUGH = Path("/proc/self/maps"), 25_000


@pytest.fixture(autouse=True)
def memory_maps():
    """Compiled programs hold memory maps, and XLA crashes where Linux grants no more, at 65,530: let go of them in time."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > ENOUGH:
        release()


@pytest.fixture
def fedbilevel(monkeypatch, capsys):
    """Call the command in this process: (exit code, output, errors)."""
    monkeypatch.setattr(cli, "_keep_compiled_programs", lambda: None)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["fedbilevel", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call
