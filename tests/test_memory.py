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
    within = []

    @memory.seldom_collecting()
    def fails():
        within.append(gc.get_threshold()[0])
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert within[0] >= 50_000
    assert gc.get_threshold() == before


def test_looks_at_everything_take_a_small_part_of_the_time(monkeypatch):
    now, ends = [0.0], []

    def collect():
        now[0] += 0.4
        ends.append(now[0])

    monkeypatch.setattr(memory.time, "process_time", lambda: now[0])
    monkeypatch.setattr(memory.gc, "collect", collect)
    looks = memory.Looks()
    while now[0] < 200:
        now[0] += 0.5
        looks.after()
    assert ends[0] < 6  # and soon for the first time
    assert 0.005 < 0.4 * len(ends) / now[0] <= 1 / looks.parts
