"""The processes of a run on this machine: all carry its mark, so that none is left when it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

MARK = "FEDBILEVEL_RUN"  # in the environment of every process of a run: the folder of its results


def processes(folder: Path) -> list[int]:
    """The numbers of the processes of runs in the folder: those that carry its mark (where there is a /proc)."""
    found = []
    for place in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            marks = [entry for entry in place.read_bytes().split(b"\0") if entry.startswith(MARK.encode() + b"=")]
            of_run = any(Path(os.fsdecode(entry.partition(b"=")[2])).is_relative_to(folder) for entry in marks)
            if of_run and int(place.parent.name) != os.getpid():
                found.append(int(place.parent.name))
    return found


def end_all(folder: Path, patience: float = 0.0) -> None:
    """See that no process of a run in the folder is left."""
    until = time.monotonic() + patience
    while (left := processes(folder)) and time.monotonic() < until:
        time.sleep(0.2)
    for number in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
