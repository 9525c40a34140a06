"""What the tests of the network engine share: runs of the command, and what they leave behind."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


def command(*words) -> list[str]:
    return [sys.executable, "-m", "fedbilevel", *map(str, words)]


def call(*words, code=0) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command(*words), env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == code, (done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout + done.stderr


def numbers(folder: Path) -> np.ndarray:
    with np.load(folder / "variables.npz") as kept:
        return np.concatenate([kept[name].ravel() for name in sorted(kept.files)])


def lines(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


def close(one: Path, other: Path, tolerance: float) -> None:
    a, b = numbers(one), numbers(other)
    assert np.abs(b).max() > 1e-3
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def same_books(one: Path, other: Path) -> None:
    """The same rounds and payload bytes, iteration by iteration; and the lines of rounds.csv add up to them."""
    names = ("iteration", "rounds", "bytes_down", "bytes_up")
    books = [[[int(line[name]) for name in names] for line in lines(place / "history.csv")] for place in (one, other)]
    assert books[0] == books[1]
    rounds = lines(one / "rounds.csv")
    assert [sum(int(line[name]) for line in rounds) for name in names[2:]] == books[0][-1][2:]
    assert all(int(line["wire_down"]) > int(line["bytes_down"]) > 0 for line in rounds)
    assert all(line["asked"] == line["replied"] and not line["failed"] for line in rounds)
    assert all(0 < float(second) < 100 for line in rounds for second in line["latency"].split())


def compiled_once(folder: Path, sites: int) -> None:
    """Each site compiled each of its methods once: its process stayed."""
    counts = json.loads((folder / "outcome.json").read_text())["sites"]["compiled"]
    assert len(counts) == sites
    assert all(times == 1 for methods in counts.values() for times in methods.values())


def nothing_left(folder: Path) -> None:
    """No process of a run is left."""
    from fedbilevel.engines.nvflare.processes import processes

    assert processes(folder) == []


def started(file: Path, out: Path, *words) -> subprocess.Popen:
    return subprocess.Popen(
        command("run", file, "--out", out, "--engine", "nvflare", *words), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(condition, seconds=120.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.05)


def rounds_so_far(out: Path) -> int:
    return len(lines(out / "rounds.csv")) if (out / "rounds.csv").is_file() else 0


def wait_for_round(process: subprocess.Popen, out: Path, rounds: int, seconds=400.0) -> None:
    """Wait until a run has had so many rounds; where it does not get there, end it and say what it told last."""
    until = time.monotonic() + seconds
    while rounds_so_far(out) < rounds:
        ended, late = process.poll() is not None, time.monotonic() > until
        if ended or late:
            process.send_signal(signal.SIGINT)  # it ends what it has started, in up to 40 s
            printed = process.communicate(timeout=120)[0]
            kept = [(out / name) for name in ("rounds.csv", "outcome.json", "nvflare.log")]
            told = [f"{file.name}:\n{file.read_text(errors='replace')[-3000:]}" for file in kept if file.is_file()]
            why = f"ended with {process.returncode}" if ended else f"was not there after {seconds:g} s"
            raise AssertionError("\n".join([f"{rounds} rounds: the run {why}", printed[-2000:], *told]))
        time.sleep(0.05)


def worker_of(out: Path, site: str) -> int:
    return json.loads((out / "outcome.json").read_text())["workers"][site]
