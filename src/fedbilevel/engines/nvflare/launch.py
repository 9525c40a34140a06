"""A run over nvflare on this machine, in a process of its own, so that its logs and threads are not the caller's.

`run(...)` starts it, shows how far it is, and ends it, with everything that it started, when the caller is interrupted. The
process itself is `python -m fedbilevel.engines.nvflare.launch JSON`.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from ...app import App
from ...callbacks.progress import Meter
from ...errors import InputError, RunError, warn
from ...given import JSON
from .processes import MARK, end_all

_LOOK = 0.3  # seconds between looks at a run
_STARTS = 3  # of nvflare's simulator, where it loses a site before the run has begun
_TOGETHER = 20.0  # seconds within which all sites' processes are there, once one is
_SITE = "nvflare.private.fed.app.simulator.simulator_worker"  # the module that a site's process in the simulator runs
_PATIENCE = 40.0  # seconds within which an interrupted run has to end by itself


def run(
    app: str, loaded: App, out: Path, clients: int, settings: Mapping[str, int | str | None], *, poc: bool, resume: bool,
    tuning: Mapping[str, JSON] | None = None,
) -> None:  # fmt: skip
    """Run an application in nvflare's simulator or (`poc`) provisioned, or tune it; results go to the folder `out`.

    Raises:
        InputError: the app cannot be used.
        RunError: the run failed.
    """
    from .job import export

    out = out.resolve()
    job = export(app, out / "job", settings, clients, out=str(out), resume=resume, tuning=tuning)
    told = {"job": str(job), "out": str(out), "clients": clients, "poc": poc}
    name = loaded.name if tuning is None else f"tune {loaded.name}"
    for left in reversed(range(_STARTS)):
        (out / "outcome.json").unlink(missing_ok=True)
        if not _loses_a_site(told, loaded, out, name):
            break
        lost = "nvflare's simulator lost a site before the run had begun"
        if not left:
            raise RunError(f"{lost}, {_STARTS} times: see {out / 'nvflare.log'}.")
        warn(f"{lost}: it is started again.")
    conclude(out)


def _loses_a_site(told: Mapping[str, Any], loaded: App, out: Path, name: str) -> bool:
    """Start it, and wait until it ends; whether nvflare lost a site before the run had begun, and it was ended here.

    The simulator takes a port for each site, lets go of it, and has the site's process take it seconds later: if it is
    another's by then, that process ends, and the server waits for the site (nvflare 2.9).
    """
    with (out / "nvflare.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(told)], stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, MARK: str(out)},
        )  # fmt: skip
    watch = _Sites(process.pid, int(told["clients"]))
    try:
        news = "making certificates and starting the sites" if told["poc"] else "starting the sites"
        with Meter(name, int(loaded.iterations or loaded.rounds or 0) or None, news=news) as meter:
            while process.poll() is None:
                time.sleep(_LOOK)
                _show(meter, out, loaded, news)
                if not told["poc"] and not _begun(out) and watch.lost():
                    _end(process, out)
                    return True
        return False
    finally:
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.send_signal(signal.SIGINT)
                process.wait(_PATIENCE)
        _end(process, out)


def _begun(out: Path) -> bool:
    """Whether the server has met all sites, or has said why not."""
    try:
        outcome = json.loads((out / "outcome.json").read_text())
    except (OSError, ValueError):  # not there yet, or about to be written
        return False
    return outcome["status"] != "running" or "workers" in outcome


class _Sites:
    """The sites' processes in nvflare's simulator, as long as a run has not begun."""

    def __init__(self, simulator: int, sites: int):
        self._simulator, self._sites = simulator, sites
        self._seen: dict[int, psutil.Process] = {}
        self._first = math.inf  # when there was one

    def lost(self) -> bool:
        """Whether one that was there has ended, or has not come when others have."""
        with contextlib.suppress(psutil.Error):  # the simulator is gone, or something changed while it was looked at
            self._look()
        if self._seen:
            self._first = min(self._first, time.monotonic())
        ended = any(not _runs(process) for process in self._seen.values())
        return ended or (len(self._seen) < self._sites and time.monotonic() - self._first > _TOGETHER)

    def _look(self) -> None:
        """Take note of those that are there; what a site's process has forked is for a moment called as it is."""
        there: dict[int, psutil.Process] = {}
        for process in psutil.Process(self._simulator).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if _SITE in process.cmdline() and _runs(process):
                    there[process.pid] = process
        self._seen |= {number: each for number, each in there.items() if each.ppid() not in there | self._seen}


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def conclude(out: Path) -> None:
    """Raise what became of a run, if it did not end well."""
    file = out / "outcome.json"
    outcome = json.loads(file.read_text()) if file.is_file() else {"status": "failed"}
    for warning in outcome.get("warnings", ()):
        warn(warning)
    sentence = outcome.get("sentence", f"nvflare ended the run before it was done: see {out / 'nvflare.log'}.")
    if outcome["status"] == "refused":
        raise InputError(sentence)
    if outcome["status"] != "done":
        raise RunError(sentence)


def _show(meter: Meter, out: Path, loaded: App, before: str) -> None:
    """What the latest lines of history.csv and rounds.csv say; `before` there are any, what goes on till then."""
    row, book = _last(out / "history.csv"), _last(out / "rounds.csv")
    if not row or not book:
        meter.update(0, before)
        return
    done = int(row["iteration" if loaded.iterations else "rounds"])
    asked, replied = book["asked"].split(), book["replied"].split()
    several = f"{row['candidates']} candidates, " if int(row.get("candidates", 1)) > 1 else ""
    news = f"{several}iteration {book['iteration']}, {book['exchange']}: {len(replied)} of {len(asked)} sites"
    if replied:
        seconds, last = max(zip(map(float, book["latency"].split()), replied, strict=True))
        news += f", {last} last after {seconds:.3f} s"
    meter.update(done, news + (f"; {book['failed']}" if book["failed"] else ""))


def _last(file: Path) -> dict[str, str]:
    """The last whole line of a CSV file, by column; empty if there is none yet."""
    try:
        with file.open("rb") as text:
            head = text.readline()
            text.seek(max(len(head), file.stat().st_size - 65536))
            whole = [line for line in text.read().splitlines(keepends=True) if line.endswith(b"\n")]
    except OSError:
        return {}
    if not whole:
        return {}
    names, values = list(csv.reader([head.decode(), whole[-1].decode()]))
    return dict(zip(names, values, strict=True)) if len(names) == len(values) else {}


def _end(process: subprocess.Popen, out: Path) -> None:
    """End what is left of the run: its process group, and processes of a deployment in the folder."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    end_all(out)


# The process itself -----------------------------------------------------------------------------------------------------


def main() -> None:
    """What `run` starts."""
    from .poc import deployment, submit

    told = json.loads(sys.argv[1])
    job, out, clients = Path(told["job"]), Path(told["out"]), told["clients"]
    if told["poc"]:
        with deployment(out / "poc", clients) as kit:
            submit(kit, job, clients)
    else:  # it forks: nothing here may have used JAX before, as an app does when it is read
        from nvflare.private.fed.app.simulator.simulator_runner import SimulatorRunner

        SimulatorRunner(
            job_folder=str(job),
            workspace=str(out / "nvflare"),
            n_clients=clients,
            threads=clients,
            log_config="concise",
        ).run()


if __name__ == "__main__":
    main()
