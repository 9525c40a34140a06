"""A run over nvflare on this machine, in a process of its own, so that its logs and threads are not the caller's.

`run(...)` starts it, shows how far it is, and ends it, with everything that it started, when the caller is interrupted. The
process itself is `python -m fedbilevel.engines.nvflare.launch JSON`.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from ...app import App
from ...callbacks.progress import Meter
from ...errors import InputError, RunError, warn
from .processes import MARK, end_all

_LOOK = 0.3  # seconds between looks at a run
_PATIENCE = 40.0  # seconds within which an interrupted run has to end by itself


def run(
    app: str, loaded: App, out: Path, clients: int, settings: Mapping[str, int | str | None], *, poc: bool, resume: bool
) -> None:
    """Run an application in nvflare's simulator or (`poc`) provisioned; results go to the folder `out`.

    Raises:
        InputError: the app cannot be used.
        RunError: the run failed.
    """
    from .job import export

    out = out.resolve()
    job = export(app, out / "job", settings, clients, out=str(out), resume=resume)
    environment = {**os.environ, MARK: str(out)}
    told = {"job": str(job), "out": str(out), "clients": clients, "poc": poc}
    (out / "outcome.json").unlink(missing_ok=True)
    with (out / "nvflare.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(told)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment,
        )  # fmt: skip
    try:
        news = "making certificates and starting the sites" if poc else "starting the sites"
        with Meter(loaded.name, int(loaded.iterations or loaded.rounds or 0) or None, news=news) as meter:
            while process.poll() is None:
                time.sleep(_LOOK)
                _show(meter, out, loaded, news)
    finally:
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.send_signal(signal.SIGINT)
                process.wait(_PATIENCE)
        _end(process, out)
    conclude(out)


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
    news = f"iteration {book['iteration']}, {book['exchange']}: {len(replied)} of {len(asked)} sites"
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
