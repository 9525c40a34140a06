"""Several processes of one script: started, watched, and ended all together.

The launcher holds one end of a pipe and every process the other. Where the launcher is gone, however it ended, or closes
its end because one of them has died, each process reads the end of the pipe and exits: nobody is left waiting.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

from ..errors import RunError, check
from ..given import Whole, whole_number
from ..processes import ADDRESS, CHECKPOINT, COUNT, GONE, INDEX, NOTES, rank

LIFELINE = "FEDBILEVEL_LIFELINE"  # the number of the pipe's end that a process reads
PATIENCE = 10.0  # seconds in which processes are to end by themselves
_DEVICES = "JAX_LOCAL_DEVICE_IDS"


def launch(
    script: str | os.PathLike[str],
    arguments: Sequence[str] = (),
    processes: Whole | None = None,
    *,
    coordinator: str | None = None,
    of: Whole | None = None,
    first: Whole = 0,
) -> None:
    """Run a script as several processes, which `fedbilevel.processes.join` finds; returns when all have ended well.

    What process 0 prints is shown, what the others print is not (it is the same); of errors all are. Started by mpirun or
    srun as one of several it runs the script as one process, which is what they say it is.

    Args:
        script: a Python file. `arguments` are its own.
        processes: how many to start here; None: two, or one where mpirun or srun has started several of these.
        coordinator: where process 0 can be reached, host:port; None: on this machine.
        of: how many there are on all machines; None: those started here.
        first: which of all is the first that is started here.

    Raises:
        InputError: there is no such file, or the numbers do not go together.
        RunError: a process has died; the others are ended, and it says which it was and where the last checkpoint is.
    """
    check(Path(script).is_file(), f"there is no script {script}.")
    count, index = rank()
    if processes is None and count > 1:
        return _all([str(script), *arguments], count, range(index, index + 1), {})
    here = whole_number(2 if processes is None else processes, 1, "--processes is how many to start here, at least 1")
    total = (
        here if of is None else whole_number(of, here, "--of is how many there are in all, at least those started here")
    )
    begin = whole_number(first, 0, "--first is which of all is the first here, from 0 on")
    check(
        begin + here <= total, f"processes {begin} to {begin + here - 1} are beyond the {total} that there are (--of)."
    )
    check(
        total == here or coordinator, "--of and --first need --coordinator HOST:PORT, where process 0 can be reached."
    )
    shared = {COUNT: str(total), ADDRESS: coordinator or f"127.0.0.1:{_free_port()}"}
    _all([str(script), *arguments], total, range(begin, begin + here), shared)


def _all(command: list[str], total: int, indices: range, shared: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory(prefix="fedbilevel-") as notes:
        _Running(Path(notes), total).run(command, shared | {NOTES: notes}, indices)


class _Running:
    """The processes that were started here.

    Args:
        notes: the folder in which they leave a word.
        total: how many there are on all machines.
    """

    def __init__(self, notes: Path, total: int):
        self._notes, self._total = notes, total
        self._started: dict[psutil.Popen, int] = {}  # and which of all it is
        self._ended: list[psutil.Popen] = []  # in the order in which they did

    def run(self, command: list[str], shared: dict[str, str], indices: range) -> None:
        """Start them, and wait until all have ended well."""
        reads, holds = os.pipe()
        try:
            for index in indices:
                self._start(command, shared, index, len(indices), reads)
            os.close(reads)
            self._wait()
        except KeyboardInterrupt:  # which they have heard too
            self._wait_some(PATIENCE)
            raise RunError(f"interrupted: {self._resume()}") from None
        finally:
            os.close(holds)
            self._end_all()

    def _start(self, command: list[str], shared: dict[str, str], index: int, here: int, reads: int) -> None:
        own = {LIFELINE: str(reads)} | ({INDEX: str(index)} if COUNT in shared else {})
        if here > 1 and _DEVICES not in os.environ:  # of several GPUs each takes one
            own[_DEVICES] = str(len(self._started))
        process = psutil.Popen(
            [sys.executable, "-m", "fedbilevel.launch.child", *command], env=os.environ | shared | own,
            pass_fds=[reads], stdout=subprocess.DEVNULL if index and here > 1 else None,
        )  # fmt: skip
        self._started[process] = index

    def _wait(self) -> None:
        """Until all have ended.

        Raises:
            RunError: one has ended badly.
        """
        while len(self._ended) < len(self._started):
            self._wait_some(0.1)
            if any(process.returncode for process in self._ended):
                raise RunError(self._sentence())

    def _wait_some(self, seconds: float) -> None:
        left = [process for process in self._started if process not in self._ended]
        gone = psutil.wait_procs(left, timeout=seconds)[0]
        self._ended += [process for process in left if process in gone]

    def _end_all(self) -> None:
        """See that none is left: the pipe is closed, so that each ends by itself; one that does not is killed."""
        self._wait_some(PATIENCE)
        for process in self._started:
            if process not in self._ended:
                process.kill()
        self._wait_some(PATIENCE)

    def _sentence(self) -> str:
        """Who has died, and how to go on."""
        own = [process for process in self._ended if not (self._notes / f"{GONE}-{self._started[process]}").is_file()]
        if not own:
            who = "another process of the run, on another machine, has ended"
        else:
            code, index = own[0].returncode, self._started[own[0]]
            who = f"process {index} of {self._total} {_ending(code)}"
        return f"{who}; all others are ended: {self._resume()}"

    def _resume(self) -> str:
        try:
            file = Path((self._notes / CHECKPOINT).read_text())
            with file.open("rb") as lines:
                iteration = json.loads(lines.readline())["iteration"]
        except OSError:
            return "there is no checkpoint to go on from (callbacks=[fb.callbacks.Checkpoint(folder)] writes them)."
        return f"go on with resume={str(file.parent)!r}, whose checkpoint is of iteration {iteration}."


def _ending(code: int) -> str:
    if code >= 0:
        return f"has ended with exit code {code}" if code else "has ended before the others were done (exit code 0)"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
