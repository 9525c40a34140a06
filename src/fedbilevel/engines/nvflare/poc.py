"""A provisioned deployment on this machine: certificates, mutual TLS, a process of its own for the server and for each site.

All of it by nvflare's own tools: `nvflare poc` makes the certificates and starts the processes, its administrator's session
submits the job. What was started is stopped again, by its process numbers if it does not go by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import RunError
from .job import conclude, export

_READY = 120.0  # seconds within which all processes have joined
_ADMIN = "admin@nvidia.com"


def run_poc(app: str | Path, out: Path, clients: int, settings: dict[str, Any], resume: bool) -> None:
    """Provision, start, submit, wait, stop."""
    job = export(app, out / "job", settings, resume, clients, str(out.resolve()))
    with deployment(out / "poc", clients) as kit:
        submit(kit, job, clients)
    conclude(out)


@contextlib.contextmanager
def deployment(folder: Path, clients: int) -> Iterator[Path]:
    """A running deployment in a folder; yields the administrator's startup kit."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tool = lambda *words: _nvflare(folder, *words)
    tool("poc", "prepare", "-n", str(clients), "--force")
    try:
        tool("poc", "start", "-ex", _ADMIN)
        yield sorted(folder.glob(f"*/prod_*/{_ADMIN}"))[-1]
    finally:
        with contextlib.suppress(RunError, subprocess.TimeoutExpired):
            tool("poc", "stop")
        end(folder)


def submit(kit: Path, job: Path, clients: int) -> str:
    """Wait for all sites, submit a job folder, wait for its end: its status in nvflare's words."""
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    session = None
    until = time.monotonic() + _READY
    while session is None or len(session.get_system_info().client_info) < clients:
        if time.monotonic() > until:
            raise RunError(f"the sites did not all join within {_READY:g} s: see the logs beside {kit}.")
        time.sleep(1)
        with contextlib.suppress(Exception):  # the server is not up yet
            session = session or new_secure_session(_ADMIN, str(kit), timeout=5.0)
    try:
        number = session.submit_job(str(job))
        session.monitor_job(number, poll_interval=0.5)
        return str(session.get_job_meta(number).get("status"))
    finally:
        session.close()


def processes(folder: Path) -> list[int]:
    """The numbers of the processes whose command line names the folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in place.read_bytes() and int(place.parent.name) != os.getpid():
                found.append(int(place.parent.name))
    return found


def end(folder: Path, patience: float = 10.0) -> None:
    """See that nothing of a deployment is left running."""
    until = time.monotonic() + patience
    while (left := processes(folder)) and time.monotonic() < until:
        time.sleep(0.5)
    for number in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def _nvflare(folder: Path, *words: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # its scripts call python3
    environment = {**os.environ, "NVFLARE_POC_WORKSPACE": str(folder), "PATH": path}
    log = folder.parent / "nvflare.log"
    with log.open("a") as file:
        done = subprocess.run(
            [sys.executable, "-m", "nvflare.cli", *words],
            env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, timeout=120, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise RunError(f"nvflare {' '.join(words)} failed: see {log}.")
