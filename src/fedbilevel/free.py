"""How much memory this process may still take, and which folders are memory."""

from __future__ import annotations

import contextlib
from pathlib import Path

import jax

_GROUPS = Path("/proc/self/cgroup")
_MOUNTED = Path("/sys/fs/cgroup")
_IN_MEMORY = ("tmpfs", "ramfs")


def free_memory() -> int:
    """Bytes: of the machine, of the container's or user's limit, or of the accelerator that computes."""
    import psutil

    device = jax.local_devices()[0].memory_stats()
    if device and "bytes_limit" in device:
        return int(device["bytes_limit"]) - int(device.get("bytes_in_use", 0))
    return max(0, min([psutil.virtual_memory().available, *_of_groups(), *_of_process()]))


def _of_process() -> list[int]:
    """What `ulimit -v` leaves."""
    with contextlib.suppress(ImportError, OSError):
        import resource

        import psutil

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            return [most - psutil.Process().memory_info().vms]
    return []


def _of_groups() -> list[int]:
    """What the control groups leave that the process is in; pages of files can be given back."""
    found: list[int] = []
    for group in _groups():
        with contextlib.suppress(OSError, ValueError, KeyError):  # no limit is the word "max"
            if (group / "memory.max").exists():
                most, used = _number(group / "memory.max"), _number(group / "memory.current")
                cached = "inactive_file"
            else:
                most, used = _number(group / "memory.limit_in_bytes"), _number(group / "memory.usage_in_bytes")
                cached = "total_inactive_file"
            found.append(most - used + _table(group / "memory.stat")[cached])
    return found


def _groups() -> list[Path]:
    """The folders of this process's groups and of those around them."""
    paths = [_MOUNTED, _MOUNTED / "memory"]
    with contextlib.suppress(OSError):
        for line in _GROUPS.read_text().splitlines():
            _, kinds, name = line.split(":", 2)
            if kinds in ("", "memory"):
                own = _MOUNTED / kinds / name.lstrip("/")
                paths += [own, *(above for above in own.parents if above.is_relative_to(_MOUNTED))]
    return list(dict.fromkeys(paths))


def _number(file: Path) -> int:
    return int(file.read_text())


def _table(file: Path) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in file.read_text().splitlines())}


def in_memory(folder: Path) -> bool:
    """Whether what lies in a folder takes memory."""
    import psutil

    own = folder.resolve()
    around = [part for part in psutil.disk_partitions(all=True) if own.is_relative_to(part.mountpoint)]
    return bool(around) and max(around, key=lambda part: len(part.mountpoint)).fstype in _IN_MEMORY
