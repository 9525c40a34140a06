"""Whether clients' states have room where they are to lie: said, or refused, before anything is allocated."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import jax
from jaxtyping import PyTree

from ...errors import InputError, check, warn
from ...free import free_memory, in_memory
from .layout import layout_of

IN_MEMORY, ON_DISK = "memory", "disk"
HELD = 3  # how often all states are in memory: before a stretch, after it, and where a run may go back to
COHORT = 4  # how often a cohort's are: as read, as new, as bytes, and what they were
_WORTH_SAYING = 10**9  # bytes


def check_place(given: str | os.PathLike[str]) -> None:
    """Refuse what is neither a word nor a folder."""
    known = given in (IN_MEMORY, ON_DISK) or (isinstance(given, (str, os.PathLike)) and Path(given).is_dir())
    check(known, f'client_state= is "memory", "disk", or a folder that exists; got {given!r}.')


def room(given: str | os.PathLike[str], name: str, one: PyTree, clients: int, cohort: int) -> Path | None:
    """The folder in which clients' states are to lie; None for memory.

    Args:
        given: the engine's `client_state`.
        name: of the algorithm.
        one: a client's state, or None.
        cohort: how many clients an exchange asks.

    Raises:
        InputError: there is not enough memory, or disk; the sentence has both figures.
    """
    if not jax.tree.leaves(one):
        return None
    row = layout_of(one).kind.itemsize
    total = row * clients
    what = f"{name} keeps {_size(row)} for each of {clients:,} clients, {_size(total)} in all"
    if given == IN_MEMORY:
        _fits_memory(what, HELD * total, total)
        return None
    folder = _default_folder() if given == ON_DISK else Path(given)
    _fits_disk(what, folder, total, COHORT * row * min(cohort, clients))
    return folder


def _fits_memory(what: str, need: int, total: int) -> None:
    if need < _WORTH_SAYING // 4:  # no look at the machine
        return
    free, disk = free_memory(), shutil.disk_usage(_default_folder()).free
    if need > free:
        raise InputError(
            f"{what}: in memory up to {_size(need)}, of which {_size(free)} are free. "
            f'Simulation(client_state="disk") keeps them in a file of {_size(total)} ({_default_folder()} has '
            f"{_size(disk)} free); client_state=FOLDER takes another folder."
        )
    if need > _WORTH_SAYING:
        warn(
            f'{what}: in memory up to {_size(need)} ({_size(free)} are free). client_state="disk" keeps them in a file.'
        )


def _fits_disk(what: str, folder: Path, total: int, cohort: int) -> None:
    if in_memory(folder):
        raise InputError(
            f"{folder} is a file system in memory, where {what.replace(' keeps', ' would keep')}: name a folder on a disk, "
            "client_state=FOLDER."
        )
    disk, free = shutil.disk_usage(folder).free, free_memory()
    if total > disk or cohort > free:
        raise InputError(
            f"{what}: a file of {_size(total)} in {folder}, which has {_size(disk)} free, and up to {_size(cohort)} of "
            f"memory for those that one exchange asks, of which {_size(free)} are free. Name a folder with more room "
            "(client_state=FOLDER), or ask fewer clients at a time (cohort=)."
        )
    if total > _WORTH_SAYING:
        warn(f"{what}: they lie in a file in {folder} ({_size(disk)} are free), which goes with the run.")


def _default_folder() -> Path:
    """Where temporary files lie; that of large ones, where a system has one."""
    large = Path("/var/tmp")
    chosen = "TMPDIR" in os.environ or not os.access(large, os.W_OK)
    return Path(tempfile.gettempdir()) if chosen else large


def _size(many: int) -> str:
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if many >= 10**power:
            return f"{many / 10**power:.3g} {unit}"
    return f"{many} bytes"
