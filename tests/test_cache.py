"""Compiled programs on disk: where, how many, and when an entry is not trusted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedbilevel as fb
from fedbilevel import cache
from fedbilevel.machine import Machine

KEY, VALUE = "jit_f-0123", b"a program" * 50
PROGRAM = """
import sys
import jax, jax.numpy as jnp
from fedbilevel import cache
cache.begin()
asked = []
jax.monitoring.register_event_listener(lambda event, **_: asked.append(event))
print(jax.jit(lambda a: jnp.sin(a) * 3)(jnp.float32(1)), end=" ")
print(sum("cache_hits" in event for event in asked), cache.folder(), end=" ")
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
for k in range(2):  # the first one finds that there is another cache
    jax.jit(lambda a: a * k + 5.5)(jnp.float32(1))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(cache.folder())
"""


@pytest.fixture(autouse=True)
def no_other(monkeypatch):
    """The tests themselves may run with a cache of JAX's own."""
    monkeypatch.setattr(cache, "_jax_keeps", lambda: False)


@pytest.fixture
def disk(tmp_path):
    return cache.Disk(tmp_path)


def only(disk):
    (file,) = disk._path.glob("*-cache")
    return file


def test_what_is_kept_is_found_by_its_key_alone(disk):
    assert disk.get(KEY) is None
    disk.put(KEY, VALUE)
    assert cache.Disk(disk.root).get(KEY) == VALUE
    assert disk.get("jit_f-4567") is None


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:100] + b"x" + b[101:], lambda b: b""])
def test_a_damaged_entry_is_no_entry_and_makes_room_for_another(disk, damage):
    disk.put(KEY, VALUE)
    only(disk).write_bytes(damage(only(disk).read_bytes()))
    assert disk.get(KEY) is None
    disk.put(KEY, VALUE)
    assert disk.get(KEY) == VALUE


def test_an_entry_under_another_name_is_not_trusted(disk):
    disk.put(KEY, VALUE)
    only(disk).rename(disk._file("jit_g"))
    assert disk.get("jit_g") is None


@pytest.mark.parametrize("folder", ["another", None])
def test_an_entry_of_another_machine_is_not_trusted(disk, monkeypatch, folder):
    """It lies in another folder; and where somebody copies it here its digest is another."""
    disk.put(KEY, VALUE)
    told = Machine("another processor", folder or disk._path.name)
    monkeypatch.setattr(cache, "machine", lambda: told)
    assert cache.Disk(disk.root).get(KEY) is None


def test_the_bound_holds_over_all_machines_and_versions(tmp_path):
    most = 2**20
    old = tmp_path / "jax-0.1-jaxlib-0.1-linux-x86_64-0123"
    old.mkdir()
    for n in range(8):
        (old / f"{n}-cache").write_bytes(bytes(2**17))
        os.utime(old / f"{n}-cache", (n, n))
    (tmp_path / "mine-cache").write_bytes(b"not ours")
    disk = cache.Disk(tmp_path, most)
    for n in range(12):
        disk.put(str(n), os.urandom(2**16))
        assert sum(file.stat().st_size for file in tmp_path.glob("*/*")) <= most
    assert all(disk.get(str(n)) is not None for n in range(12))
    left = sorted(file.name for file in old.iterdir())
    assert left == sorted(f"{n}-cache" for n in range(8 - len(left), 8))  # those not used for the longest are gone
    assert (tmp_path / "mine-cache").exists()


def test_what_is_used_stays(tmp_path):
    disk = cache.Disk(tmp_path)
    for n in range(3):
        disk.put(str(n), bytes(2**10))
        os.utime(disk._file(str(n)), (n, n))
    disk.get("0")
    cache.prune(tmp_path, 2**11 + 2**8)
    assert [disk.get(str(n)) is not None for n in range(3)] == [True, False, True]


def test_a_full_disk_keeps_nothing(disk, monkeypatch):
    usage = lambda path: type("Usage", (), {"free": 10})()
    monkeypatch.setattr(cache.shutil, "disk_usage", usage)
    disk.put(KEY, VALUE)
    assert disk.get(KEY) is None


def test_a_write_that_fails_is_said_once_and_leaves_nothing(disk, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    with pytest.warns(fb.errors.FedbilevelWarning, match="No space left on device.*FEDBILEVEL_CACHE"):
        disk.put(KEY, VALUE)
    disk.put(KEY, VALUE)
    assert not list(disk._path.iterdir())


def test_what_xla_refuses_to_take_back_ends_the_cache(disk):
    """JAX then compiles it and wants to keep it again: no later process asks."""
    disk.put(KEY, VALUE)
    assert disk.get(KEY) == VALUE
    disk.put(KEY, VALUE)
    assert disk.get(KEY) is None
    assert not cache.Disk(disk.root).on


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="the system has no such permissions")
def test_a_folder_in_which_others_may_write_is_not_trusted(disk):
    disk._path.chmod(0o777)
    with pytest.raises(PermissionError, match="others may write there"):
        cache.Disk(disk.root)


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for word, place in {"": tmp_path / "fedbilevel" / "xla", "/there": Path("/there"), "Off": None, "0": None}.items():
        monkeypatch.setenv(cache.ENVIRONMENT, word)
        assert cache._place() == place
    monkeypatch.setenv(cache.ENVIRONMENT, "")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache._place() == cache._default()
    assert cache._default().is_relative_to(Path.home())


@pytest.mark.parametrize(("word", "theirs", "kept"), [("off", False, False), ("", True, False), ("", False, True)])
def test_who_decides(monkeypatch, word, theirs, kept):
    """The first program of a process begins to keep them, unless the variable or a cache of the user's says no."""
    installed = []
    monkeypatch.setattr(cache, "_standing", cache._Standing())
    monkeypatch.setattr(cache, "_install", lambda place, most: installed.append(place))
    monkeypatch.setattr(cache, "_jax_keeps", lambda: theirs)
    monkeypatch.setenv(cache.ENVIRONMENT, word)
    for _ in range(2):
        cache.begin()
    assert len(installed) == kept


def test_switched_on_and_off_by_hand(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "_standing", cache._Standing())
    monkeypatch.setattr(cache.jax.config, "update", lambda *_: None)
    monkeypatch.setattr(cache.compilation_cache, "_cache", None)
    cache.use(tmp_path, most=2**20)
    assert cache.folder().parent == tmp_path
    assert cache.compilation_cache._cache.most == 2**20
    cache.off()
    assert cache.folder() is None
    with pytest.raises(fb.InputError, match="how many bytes may be kept, at least 2"):
        cache.use(tmp_path, most=10)


def test_the_command_line_passes_it_on(fedbilevel, monkeypatch):
    monkeypatch.setenv(cache.ENVIRONMENT, "elsewhere")
    assert fedbilevel("protocol", "quadratic", "--no-cache", "--json")[0] == 0
    assert os.environ[cache.ENVIRONMENT] == "off"


def test_a_second_process_starts_with_what_the_first_has_compiled(tmp_path):
    """And gives way to a cache of the user's own."""
    plain = {name: value for name, value in os.environ.items() if "CACHE" not in name}

    def run():
        words = [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path / "theirs")]
        out = subprocess.run(words, env=plain | {cache.ENVIRONMENT: str(tmp_path)}, capture_output=True, text=True)
        assert not out.stderr
        return out.stdout.split()

    number, hits, folder, after = run()
    assert (hits, after) == ("0", "None")
    assert Path(folder).parent == tmp_path
    assert list((tmp_path / "theirs").iterdir())
    again, hits, *_ = run()
    assert again == number
    assert int(hits) > 0
