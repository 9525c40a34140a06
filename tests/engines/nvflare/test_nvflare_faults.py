"""The network engine where things go wrong: sites struck, killed, lost, a server killed, interrupts, strangers."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from helpers import apps
from helpers.network import call, close, lines, nothing_left, numbers, started, wait_for, wait_for_round, worker_of

pytest.importorskip("nvflare")

STRUCK = """
    import multiprocessing, os, signal
    from pathlib import Path
    import jax
    import fedbilevel.engines.messaging.client_side as half

    BLOW = Path(os.environ["BLOW"])  # a file: what is to happen at site-2, once, while it computes its answer

    def struck():
        if not (multiprocessing.current_process().name.endswith("site-2") and BLOW.is_file()):
            return ""
        blow = BLOW.read_text()
        BLOW.unlink()
        return blow

    def strike(_):
        blow = struck()
        if blow.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, blow))
        if blow == "raise":
            raise ConnectionError("the line went dead")
        if blow == "short":
            short.append(True)
        return np.float32(np.nan if blow == "nan" else 0.0)

    class Struck(fb.Lockstep):
        def moves(self, client, x, y, v, c, lam):
            nothing = jax.pure_callback(strike, jax.ShapeDtypeStruct((), np.float32), jnp.zeros((), np.float32))
            return super().moves(client, x, y + nothing, v, c, lam)

    short, whole = [], half.encode
    half.encode = lambda *parts: whole(*parts)[: -8 if short and short.pop() else None]

    app = fb.App("""


@pytest.mark.network
@pytest.mark.parametrize("blow", ["SIGKILL", "SIGSTOP", "raise", "nan", "short"])
def test_a_site_struck_in_a_round_misses_it_and_comes_back(tmp_path, monkeypatch, blow):
    why = {
        "SIGKILL": "died (exit code -9)", "SIGSTOP": "did not answer within", "raise": "the line went dead",
        "nan": "not finite", "short": "bytes",
    }  # fmt: skip
    policy = "iterations=80, faults=fb.Faults(minimum=2, deadline=5.0)"
    settings = f"{policy}, {apps.LOCKSTEP.replace('fb.Lockstep', 'Struck')}"
    file = apps.write(tmp_path, apps.CLOSED_FORM.replace("app = fb.App(", STRUCK.lstrip("\n ")), settings)
    monkeypatch.setenv("BLOW", str(tmp_path / "blow"))
    call("run", file, "--out", tmp_path / "simulated")
    out = tmp_path / "network"
    process = started(file, out)
    wait_for_round(process, out, 5)
    (tmp_path / "written").write_text(blow)
    (tmp_path / "written").rename(tmp_path / "blow")
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    book = lines(out / "rounds.csv")
    missed = [line for line in book if line["failed"]]
    assert why[blow] in missed[0]["failed"]
    # one that has died may also be late while it starts again
    assert 1 <= len(missed) <= (4 if blow.startswith("SIG") else 1)
    assert all("site-2" in line["failed"] and line["replied"] == "site-1 site-3" for line in missed)
    assert all(float(line["seconds"]) < 10 for line in missed)  # twice the deadline, on a busy machine
    assert book[-1]["replied"] == book[-1]["asked"] == "site-1 site-2 site-3"
    again = [line["restarted"] for line in book if line["restarted"]]
    assert again == (["site-2"] if blow.startswith("SIG") else [])
    assert np.abs(numbers(out) - numbers(tmp_path / "simulated")).max() < 0.05 * np.abs(numbers(out)).max()
    nothing_left(tmp_path)


@pytest.mark.network
def test_a_server_that_is_killed_goes_on_to_the_same_numbers(tmp_path):
    file = apps.write(tmp_path, apps.CLOSED_FORM, f"iterations=40, {apps.LOCKSTEP}")
    out = tmp_path / "network"
    process = started(file, out)
    wait_for_round(process, out, 8)
    from fedbilevel.engines.nvflare.processes import processes

    serving = lambda number: any("nvflare.launch" in word for word in psutil.Process(number).cmdline())
    for number in filter(serving, processes(out.resolve())):  # what it forks has its name; the sites end by themselves
        os.kill(number, signal.SIGKILL)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 1, printed
    before = len(lines(out / "history.csv"))
    assert before < 41
    call("run", file, "--out", out, "--engine", "nvflare", "--resume")
    call("run", file, "--out", tmp_path / "simulated")
    close(out, tmp_path / "simulated", 1e-12)
    assert len(lines(out / "history.csv")) == 41
    nothing_left(tmp_path)


@pytest.mark.network
def test_interrupted_it_leaves_no_process(tmp_path):
    file = apps.write(tmp_path, apps.CLOSED_FORM, f"iterations=4000, {apps.LOCKSTEP}")
    out = tmp_path / "network"
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background inherits that it is ignored
    process = started(file, out)
    signal.signal(signal.SIGINT, before)
    wait_for_round(process, out, 3)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "interrupted" in printed
    nothing_left(tmp_path)


FLAKY = """
    import os
    import random
    import fedbilevel.engines.messaging.client_side as half

    def lossy(*parts):  # an answer, computed and then lost on its way
        if float(os.environ.get("LOSING", "0")) > random.random():
            raise ConnectionError("the line went dead")
        return whole(*parts)

    whole, half.encode = half.encode, lossy

    app = fb.App("""


@pytest.mark.network
def test_with_a_fifth_of_all_answers_lost_and_a_site_killed_it_learns_as_well(tmp_path, monkeypatch):
    settings = (
        'metrics={"accuracy": task.metrics["test_accuracy"]}, iterations=200, faults=fb.Faults(exclude_after=None), '
        "algorithm=fb.Lockstep(inner_lr=0.05, hessian_lr=0.02, outer_lr=0.2, local_steps=5)"
    )
    file = apps.write(tmp_path, apps.DIGITS.replace("app = fb.App(", FLAKY.lstrip("\n ")), settings)
    call("run", file, "--clients", 5, "--out", tmp_path / "simulated")
    monkeypatch.setenv("LOSING", "0.2")
    out = tmp_path / "network"
    process = started(file, out, "--clients", "5")
    wait_for_round(process, out, 40)
    os.kill(worker_of(out, "site-3"), signal.SIGKILL)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    book = lines(out / "rounds.csv")
    lost = sum(5 - len(line["replied"].split()) for line in book)
    assert 0.15 < lost / (5 * len(book)) < 0.25
    assert [line["restarted"] for line in book if line["restarted"]] == ["site-3"]
    assert any("site-3" not in line["failed"] for line in book[-10:])
    accuracy = [float(lines(place / "history.csv")[-1]["accuracy"]) for place in (tmp_path / "simulated", out)]
    assert accuracy[0] > 0.8 and accuracy[1] > accuracy[0] - 0.01
    nothing_left(tmp_path)


# Who may take part ------------------------------------------------------------------------------------------------------


MEMBERS = """
import sys, time
from pathlib import Path
from fedbilevel.engines.nvflare.poc import connect

session, seen, until = connect(Path(sys.argv[1]), 0), set(), time.monotonic() + float(sys.argv[2])
while True:
    seen |= {client.name for client in session.get_system_info().client_info}
    if time.monotonic() > until:
        break
    time.sleep(1)
session.close()
print("members:", *sorted(seen))
"""


def members(kit: Path, seconds: float) -> set[str]:
    """Who was connected at any time within so many seconds, as the administrator sees it."""
    words = [sys.executable, "-c", MEMBERS, str(kit), str(seconds)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=True)
    return set(next(line for line in done.stdout.splitlines() if line.startswith("members:")).split()[1:])


@pytest.mark.network
def test_strangers_are_refused(tmp_path, monkeypatch):

    from fedbilevel.engines.nvflare import poc
    from fedbilevel.engines.nvflare.processes import MARK

    monkeypatch.delenv(MARK, raising=False)
    settings = Path.home() / ".nvflare" / "config.conf"
    mine = settings.read_bytes() if settings.is_file() else None
    ours, others = tmp_path / "ours", tmp_path / "others"
    for place, sites in ((others, "3"), (ours, "1")):
        place.mkdir()
        poc.tool(place, "poc", "prepare", "-n", sites, "--force")
    kit = lambda place, site: next(place.glob(f"*/prod_*/{site}"))

    def stranger(folder: Path, secure: bool = True) -> subprocess.Popen:
        words = ["-m", str(folder), "-s", "fed_client.json", "--set", f"secure_train={str(secure).lower()}"]
        module = "nvflare.private.fed.app.client.client_train"
        words = [sys.executable, "-m", module, *words, f"uid={folder.name}", "org=nvidia", "config_folder=config"]
        with (folder / "stranger.log").open("w") as log:
            return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)

    with poc.deployment(ours, 1) as admin:
        wait_for(lambda: members(admin, 0) == {"site-1"})
        bare = tmp_path / "site-3"
        shutil.copytree(kit(ours, "site-1"), bare)
        for name in ("client.crt", "client.key"):
            (bare / "startup" / name).unlink()
        refused = [stranger(kit(others, "site-2")), stranger(bare)]
        try:
            with socket.create_connection(("localhost", 8002), timeout=5) as line:  # nobody speaks plain text here
                line.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                line.settimeout(5)
                try:
                    said = line.recv(100)
                except OSError:
                    said = b""
            assert not said.startswith(b"HTTP")
            assert members(admin, 25) == {"site-1"}
        finally:
            for process in refused:
                process.kill()
                process.wait()
    nothing_left(tmp_path)
    assert (settings.read_bytes() if settings.is_file() else None) == mine
    log = (kit(others, "site-2") / "stranger.log").read_text()
    assert "CERTIFICATE_VERIFY_FAILED" in log or "certificate" in log.lower() or "Handshake" in log or "SSL" in log
