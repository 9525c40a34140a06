"""A start at which nvflare's simulator loses a site is made again: the server would wait for that site."""

from __future__ import annotations

import contextlib
import json
import threading
import time

import psutil
import pytest

from helpers.network import call, close, nothing_left, same_books
from helpers.places import EXAMPLES

pytest.importorskip("nvflare")

APP = EXAMPLES / "stopping" / "app.py"


def site_processes(folder) -> list[psutil.Process]:
    """Those of the sites in nvflare's simulator, of a run with results in a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            if any("simulator_worker" in word for word in command) and any(str(folder) in word for word in command):
                found.append(process)
    return found


@pytest.mark.network
def test_a_site_lost_at_the_start_costs_a_second_start_and_nothing_else(tmp_path):
    out, ended = tmp_path / "network", []

    def end_one():
        until = time.monotonic() + 100
        while not ended and time.monotonic() < until:
            for process in site_processes(out)[:1]:
                process.kill()
                ended.append(process.pid)
            time.sleep(0.05)

    watcher = threading.Thread(target=end_one)
    watcher.start()
    printed = call("run", APP, "--out", out, "--engine", "nvflare")
    watcher.join()
    assert ended
    assert "lost a site before the run had begun: it is started again" in printed
    assert json.loads((out / "outcome.json").read_text())["status"] == "done"
    call("run", APP, "--out", tmp_path / "simulated")
    same_books(out, tmp_path / "simulated")
    close(out, tmp_path / "simulated", 1e-5)
    nothing_left(tmp_path)
