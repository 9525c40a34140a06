"""Memory that is left: the least of what the machine, control groups and limits leave."""

from pathlib import Path

import psutil
import pytest

from fedbilevel import free


def test_no_more_than_the_machine_has():
    assert 0 < free.free_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 500\ninactive_file 150\n"}, [450]),
        ({"memory.max": "max", "memory.current": "700", "memory.stat": "inactive_file 1\n"}, []),
        (
            {
                "memory.limit_in_bytes": "1000",
                "memory.usage_in_bytes": "900",
                "memory.stat": "total_inactive_file 50\n",
            },
            [150],
        ),
        ({}, []),
    ],
)
def test_control_groups(tmp_path, monkeypatch, files, left):
    own = tmp_path / "user" / "job"
    own.mkdir(parents=True)
    for name, text in files.items():
        (own / name).write_text(text)
    (tmp_path / "groups").write_text("0::/user/job\n")
    monkeypatch.setattr(free, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(free, "_MOUNTED", tmp_path)
    assert free._of_groups() == left


def test_a_folder_in_memory(tmp_path, monkeypatch):
    part = lambda point, kind: type("Part", (), {"mountpoint": str(point), "fstype": kind})()
    inner = tmp_path / "inner"
    inner.mkdir()
    mounted = [part("/", "ext4"), part(tmp_path, "tmpfs"), part(inner, "xfs")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounted)
    assert free.in_memory(tmp_path)
    assert not free.in_memory(inner)
    assert not free.in_memory(Path("/"))
