"""What every test runs under, those of the studies too: float64, JAX's strictest rules on shapes and dtypes, annotations
checked, memory maps let go; and a call of the command.

A conftest.py takes it from here.
"""

import gc
import os
import sys

import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook(
    ["fedbilevel", "fedbilevel_studies"], "helpers.checks.checked"
)  # before they are imported

from fedbilevel import cli  # noqa: E402
from fedbilevel.memory import release  # noqa: E402

from .checks import unchecked_where_refused  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

os.environ["FEDBILEVEL_STORE"] = os.devnull + "/none.toml"  # what the person who tests has found is not ours
os.environ["FEDBILEVEL_CACHE"] = "off"  # nor is what was compiled for them

gc.set_threshold(200_000, 50, 100)  # tracing makes millions of small objects, and a look at them all takes its time
pytest.raises = unchecked_where_refused(pytest.raises)


class Looks:
    """When to count memory maps: counting takes up to half a second, so only after so many more compiled programs.

    A process gets 65,530 maps; `release` lets go from 25,000 on. A program has about twenty, or two hundred where the
    compiler splits it.
    """

    more = 100

    def __init__(self):
        self.programs = 0

    def after_a_test(self):
        if abs(self._compiled() - self.programs) >= self.more:
            release()
            self.programs = self._compiled()

    def _compiled(self):
        return len(jax.local_devices()[0].client.live_executables())


_looks = Looks()


@pytest.fixture(autouse=True)
def memory_maps():
    """Hundreds of tests in one process would use them up."""
    yield
    _looks.after_a_test()


@pytest.fixture
def fedbilevel(monkeypatch, capsys):
    """Call the command in this process: (exit code, output, errors)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["fedbilevel", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call
