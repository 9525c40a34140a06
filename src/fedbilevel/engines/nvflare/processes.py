"""The processes of a run on this machine: all carry its mark, so that none is left when it ends."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import psutil

MARK = "FEDBILEVEL_RUN"  # in the environment of every process of a run: the folder of its results


def processes(folder: Path) -> list[int]:
    """The numbers of the processes of runs in the folder: those that carry its mark, as far as they can be looked at."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            mark = process.environ().get(MARK)
            if mark is not None and Path(mark).is_relative_to(folder) and process.pid != os.getpid():
                found.append(process.pid)
    return found


def end_all(folder: Path, patience: float = 0.0) -> None:
    """See that no process of a run in the folder is left."""
    until = time.monotonic() + patience
    while (left := processes(folder)) and time.monotonic() < until:
        time.sleep(0.2)
    for number in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(number).kill()
