"""A provisioned deployment on this machine: certificates, mutual TLS, a process of its own for the server and for each site.

All of it by nvflare's own tools: `nvflare poc` makes the certificates and starts the processes, its administrator's session
submits the job. What was started is stopped again, by its process numbers if it does not go by itself.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from ...errors import RunError
from .processes import MARK, end_all

_READY = 180.0  # seconds within which all processes have joined
ADMIN = "admin@nvidia.com"


@contextlib.contextmanager
def deployment(folder: Path, clients: int) -> Iterator[Path]:
    """A running deployment in a folder; yields the administrator's startup kit."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    run = Path(os.environ.setdefault(MARK, str(folder)))  # what is started from here on carries it
    if not list(folder.glob("*/prod_*")):
        tool(folder, "poc", "prepare", "-n", str(clients), "--force")
    try:
        tool(folder, "poc", "start", "-ex", ADMIN, "--no-wait")
        yield sorted(folder.glob(f"*/prod_*/{ADMIN}"))[-1]
    finally:
        with contextlib.suppress(RunError, subprocess.TimeoutExpired):
            tool(folder, "poc", "stop")
        end_all(run, patience=10.0)


def connect(kit: Path, clients: int) -> Session:
    """An administrator's session, once all sites are connected."""
    session, until = None, time.monotonic() + _READY
    while True:
        with contextlib.suppress(Exception):  # the server is not up yet
            session = session or new_secure_session(ADMIN, str(kit), timeout=5.0)
            if len(session.get_system_info().client_info) >= clients:
                return session
        if time.monotonic() > until:
            raise RunError(f"the sites did not all join within {_READY:g} s: see the logs beside {kit}.")
        time.sleep(1)


def submit(kit: Path, job: Path, clients: int) -> str:
    """Submit a job folder and wait for its end; its status in nvflare's words."""
    session = connect(kit, clients)
    try:
        number = session.submit_job(str(job))
        session.monitor_job(number, poll_interval=0.5)
        return str(session.get_job_meta(number).get("status"))
    finally:
        session.close()


@contextlib.contextmanager
def _own_settings_kept() -> Iterator[None]:
    """Leave this user's settings of nvflare as they were: `nvflare poc` makes its own startup kits the active ones there."""
    file = Path.home() / ".nvflare" / "config.conf"
    before = file.read_bytes() if file.is_file() else None
    try:
        yield
    finally:
        if before is None:
            file.unlink(missing_ok=True)
        elif file.read_bytes() != before:
            file.write_bytes(before)


def tool(folder: Path, *words: str) -> None:
    """Run nvflare's own command line for the deployment in a folder.

    Raises:
        RunError: it failed.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # its scripts call python3
    environment = {**os.environ, "NVFLARE_POC_WORKSPACE": str(folder), "PATH": path}
    with _own_settings_kept():
        done = subprocess.run(
            [sys.executable, "-m", "nvflare.cli", *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=180,
            check=False,
        )
    if done.returncode != 0:
        raise RunError(f"nvflare {' '.join(words)} failed with exit code {done.returncode}: see nvflare.log.")
