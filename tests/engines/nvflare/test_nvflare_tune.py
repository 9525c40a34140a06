"""`fedbilevel tune` over the network: the simulation's winners, numbers and books, also where the server is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import psutil
import pytest

from helpers import apps
from helpers.network import call, close, command, lines, nothing_left, rounds_so_far, wait_for_round

pytest.importorskip("nvflare")
from fedbilevel.engines.nvflare.processes import processes

ROUNDS = 120
# In the server and in the simulation a fifth of all answers goes missing, the same ones.
ALONE = "faults=fb.Faults(minimum=1, retries=0, exclude_after=None)"  # who is missing is missing
DROPPING = """
    import functools
    from fedbilevel.compare import Plan
    from fedbilevel.engines.messaging.server_side import Messaging

    def losing(init):
        @functools.wraps(init)
        def start(self, *args, **more):
            init(self, *args, **{**more, "dropout": 0.2})

        return start

    if not hasattr(Messaging.__init__, "__wrapped__"):
        Messaging.__init__ = losing(Messaging.__init__)
        Plan.build_engine = lambda plan: fb.Simulation(cohort=plan.cohort, dropout=0.2)

    app = fb.App("""


def both(tmp_path, file, *words, poc=False):
    """Tuned over the network and in simulation: (the folders)."""
    out, simulated = tmp_path / "network", tmp_path / "simulated"
    given = ("tune", file, "--rounds", ROUNDS, *words)
    call(*given, "--out", out, "--engine", "nvflare", *(["--poc"] if poc else []))
    call(*given, "--out", simulated)
    return out, simulated


def same_race(out, simulated, tolerance=1e-10):
    """Who was dropped when, by which scores; the winner's numbers; x and y; rounds and bytes."""
    tables = [lines(place / "candidates.csv") for place in (out, simulated)]
    for one, other in zip(*tables, strict=True):
        assert {**one, "score": ""} == {**other, "score": ""}
        if other["score"]:
            assert float(one["score"]) == pytest.approx(float(other["score"]), rel=max(tolerance, 1e-9))
    assert sum(line["round"] == "" for line in tables[0]) == 1
    chosen = [json.loads((place / "outcome.json").read_text())["chosen"] for place in (out, simulated)]
    assert chosen[0]["algorithm"] == chosen[1]["algorithm"]
    for name, value in chosen[1]["settings"].items():
        if isinstance(value, float):
            value = pytest.approx(value, rel=max(tolerance, 1e-9))
        assert chosen[0]["settings"][name] == value
    close(out, simulated, tolerance)
    names = ("iteration", "rounds", "bytes_down", "bytes_up", "candidates")
    books = [[[line[name] for name in names] for line in lines(place / "history.csv")] for place in (out, simulated)]
    assert books[0] == books[1]
    sent = lines(out / "rounds.csv")
    beside = sum("meter.curvature" in line["exchange"] for line in sent)  # no round
    assert len(sent) - beside == int(books[0][-1][1])


@pytest.mark.network
def test_a_race_of_weighted_sites_that_drop_out_is_the_simulations(tmp_path):
    text = apps.CLOSED_FORM.replace("app = fb.App(", DROPPING.lstrip("\n "))
    file = apps.write(tmp_path, text, f"algorithm=fb.AggITD(), iterations=3, weights='rows', {ALONE}")
    out, simulated = both(tmp_path, file, "--clients", 5)
    same_race(out, simulated)
    book = lines(out / "rounds.csv")
    assert sum("dropped out" in line["failed"] for line in book) > 20
    names = {line["exchange"] for line in book}
    assert any("+" in name for name in names)  # several algorithms ask in one message
    assert sum(not name.startswith("meter") and "meter.curvature" not in name for name in names) >= 4
    nothing_left(tmp_path)


@pytest.mark.network
def test_a_race_between_provisioned_sites_is_the_simulations(tmp_path):
    file = apps.write(tmp_path, apps.CLOSED_FORM, "algorithm=fb.AggITD(), iterations=3, cohort=2")
    out, simulated = both(tmp_path, file, "--batch-size", "4", "--candidates", "4", poc=True)
    same_race(out, simulated)
    nothing_left(tmp_path)


@pytest.mark.network
def test_in_32_bits_the_same_wins(tmp_path):
    text = apps.CLOSED_FORM.replace("precision=64, ", "")
    file = apps.write(tmp_path, text, "algorithm=fb.AggITD(), iterations=3")
    out, simulated = both(tmp_path, file, "--metric", "validation_loss:min", "--keep", "validation_loss:min")
    same_race(out, simulated, 1e-3)
    assert "best" in json.loads((out / "outcome.json").read_text())
    nothing_left(tmp_path)


@pytest.mark.network
def test_a_server_that_is_killed_in_a_race_goes_on_to_the_same_winner(tmp_path):
    """Killed before and after the first heat: candidates of one and of many rounds, with and without client state."""
    file = apps.write(tmp_path, apps.CLOSED_FORM, "algorithm=fb.Lockstep(local_steps=2), iterations=3")
    words = ("tune", file, "--rounds", 170, "--algorithms", "lockstep,simfbo,aggitd")
    out, simulated = tmp_path / "network", tmp_path / "simulated"
    call(*words, "--out", simulated)
    dropped = [int(line["round"]) for line in lines(simulated / "candidates.csv") if line["round"]]
    assert len(dropped) == 2
    for at in (min(dropped) // 2, min(dropped) + 3):
        resume = ["--resume"] if out.exists() else []
        process = subprocess.Popen(
            command(*words, "--out", out, "--engine", "nvflare", *resume),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        wait_for_round(process, out, at)
        serving = lambda number: any("nvflare.launch" in word for word in psutil.Process(number).cmdline())
        for number in filter(serving, processes(out.resolve())):
            os.kill(number, signal.SIGKILL)
        printed = process.communicate(timeout=120)[0]
        assert process.returncode == 1, printed
        assert rounds_so_far(out) < 140
    call(*words, "--out", out, "--engine", "nvflare", "--resume")
    assert (out / "candidates.csv").read_text().splitlines()[0] == (
        simulated / "candidates.csv"
    ).read_text().splitlines()[0]
    tables = [lines(place / "candidates.csv") for place in (out, simulated)]
    assert [line["round"] for line in tables[0]] == [line["round"] for line in tables[1]]
    close(out, simulated, 1e-10)
    nothing_left(tmp_path)
