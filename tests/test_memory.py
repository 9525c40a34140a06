"""Compiled programs, and the memory maps that they hold, are let go."""

import gc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel import compiled as programs
from fedbilevel import memory
from fedbilevel.protocol import derivation
from helpers.plain import plain


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


def test_free_memory_is_given_back_where_the_c_library_can(monkeypatch):
    memory.give_back()
    monkeypatch.setattr(memory, "_trim", lambda: None)  # as with others than glibc
    memory.give_back()


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


def test_forgotten_programs_are_gone_at_once(monkeypatch):
    """They are not left to Python's looks for objects that hold on to each other, which come late."""
    for kept in (programs._KEPT, programs._TRACED, derivation._KNOWN):
        monkeypatch.setattr(kept, "most", 1)
    live = lambda: len(jax.local_devices()[0].client.live_executables())
    rows = [np.arange(6.0).reshape(3, 2)] * 2
    data, x = fb.FederatedData.stack(rows, rows), jnp.ones(2)
    problem = lambda scale: fb.Problem(lambda x, y, e: scale * jnp.sum((y - x) ** 2), lambda x, y, e: jnp.sum(y * y))
    once = lambda scale: fb.solve(problem(scale), data, plain(fb.FedNest), x, x, 1, key=jax.random.key(0))
    once(1.03)
    gc.collect()
    gc.disable()
    try:
        before = live()
        for k in range(3):
            once(1.13 + k)
        assert live() <= before
    finally:
        gc.enable()
