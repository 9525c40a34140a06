"""What clients' states need is said, or refused with both figures, before anything is allocated."""

import jax.numpy as jnp
import pytest

import fedbilevel as fb
from fedbilevel.engines.simulated import room as rooms
from fedbilevel.engines.simulated.room import HELD, room
from helpers.plain import plain

ONE = jnp.zeros(1000, jnp.float32)  # 4 kB


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """One with 10 GB of memory and 20 GB of disk."""

    def set_to(memory=10e9, disk=20e9, in_memory=False):
        monkeypatch.setattr(rooms, "free_memory", lambda: int(memory))
        monkeypatch.setattr(rooms, "in_memory", lambda folder: in_memory)
        usage = lambda path: type("Usage", (), {"free": int(disk)})()
        monkeypatch.setattr(rooms.shutil, "disk_usage", usage)

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    set_to()
    return set_to


def ask(where, clients, cohort=100):
    return room(where, "Lockstep", ONE, clients, cohort)


def test_little_is_not_worth_a_word(tmp_path):
    assert ask("memory", 10**4) is None
    assert ask(tmp_path, 10**4) == tmp_path
    assert room("disk", "AggITD", None, 10**6, 100) is None  # which keeps none


def test_much_is_said():
    with pytest.warns(
        fb.errors.FedbilevelWarning, match=r"4 kB for each of 500,000 clients, 2 GB in all: in memory up to"
    ):
        assert ask("memory", 500_000) is None
    with pytest.warns(fb.errors.FedbilevelWarning, match=r"2 GB in all: they lie in a file in .*20 GB are free"):
        assert ask("disk", 500_000) is not None


def test_too_much_for_memory_is_refused_with_the_way_out():
    figures = (
        rf"4 GB in all: in memory up to {4 * HELD} GB, of which 10 GB are free.*client_state=\"disk\".*4 GB.*20 GB"
    )
    with pytest.raises(fb.InputError, match=figures):
        ask("memory", 10**6)


def test_too_much_for_the_disk_is_refused_with_both_figures(machine, tmp_path):
    machine(disk=3e9)
    with pytest.raises(fb.InputError, match=r"a file of 4 GB in .*, which has 3 GB free.*of which 10 GB are free"):
        ask(tmp_path, 10**6)
    machine(disk=3e10)
    with pytest.raises(fb.InputError, match=r"up to 16 GB of memory for those that one exchange asks.*cohort="):
        ask(tmp_path, 10**6, cohort=10**6)


def test_a_file_system_in_memory_is_no_disk(machine):
    machine(in_memory=True)
    with pytest.raises(fb.InputError, match="is a file system in memory"):
        ask("disk", 10)


def test_it_is_refused_before_anything_is_allocated(monkeypatch, machine):
    machine(memory=1)
    monkeypatch.setattr(rooms, "_WORTH_SAYING", 4)
    task = fb.tasks.quadratic(clients=3)
    with pytest.raises(fb.InputError, match=r"Lockstep keeps .* for each of 3 clients"):
        fb.solve(task.problem, task.data, plain(fb.Lockstep), task.x, task.y, 1, key=task.key)
