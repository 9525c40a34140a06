"""Compiled programs, and the memory maps that they hold, are let go."""

import gc
from pathlib import Path

import jax
import pytest

from fedbilevel import memory


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory maps are counted on Linux alone")
def test_compiled_programs_and_their_memory_maps_are_let_go():
    maps = lambda: len(Path("/proc/self/maps").read_text().splitlines())
    programs = [jax.jit(lambda x, k=k: jax.numpy.sin(x * k).sum()) for k in range(20)]
    memory.release(0)
    before = maps()
    for program in programs:
        program(jax.numpy.ones(10 * (1 + len(programs)))).block_until_ready()
    used = maps() - before
    assert used >= 20
    memory.release(10**9)  # not yet
    assert maps() - before >= used
    memory.release(0)
    assert maps() - before < used / 2


def test_garbage_is_looked_for_less_often_within_and_as_before_after():
    before = gc.get_threshold()
    with pytest.raises(KeyError), memory.seldom_collecting():
        assert gc.get_threshold()[0] >= 50_000
        raise KeyError
    assert gc.get_threshold() == before
