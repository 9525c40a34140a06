"""What every test runs under, those of the studies too: float64, JAX's strictest rules on shapes and dtypes, annotations
checked, memory maps let go; and a call of the command.

A conftest.py takes it from here.
"""

import gc
import os
import sys

import jax
import jaxtyping
import psutil
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

gc.set_threshold(200_000, 50, 100)  # tracing makes millions of small objects, and a look at them all takes its time
pytest.raises = unchecked_where_refused(pytest.raises)


class Looks:
    """When to count memory maps: counting takes up to half a second, so only where there may be too many.

    A process gets 65,530; `release` lets go from 25,000 on. How many a compiled program has is seen at each look: about
    twenty, or two hundred where the compiler splits it. Until twice as many as that allows are compiled, nobody looks.
    """

    enough, first, least = 25_000, 100, 50  # maps; programs until the first look, and at least between two

    def __init__(self):
        self.programs, self.after = 0, self.first

    def after_a_test(self):
        now = self._compiled()
        if now < self.programs:  # a test let go of them
            self.programs, self.after = now, self.first
        if now - self.programs < self.after:
            return
        maps = len(psutil.Process().memory_maps(grouped=False))
        if maps > self.enough:
            release(self.enough)
            self.programs, self.after = self._compiled(), self.first
        else:
            each = maps / now
            self.programs, self.after = now, max(int((self.enough - maps) / (2 * each)), self.least)

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
    monkeypatch.setattr(cli, "_keep_compiled_programs", lambda: None)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["fedbilevel", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return call
