"""A callback of an application stops a run over the network, at the iteration at which it stops the simulation."""

from __future__ import annotations

import json
import re

import pytest

from helpers.network import call, close, compiled_once, lines, nothing_left, same_books
from helpers.places import EXAMPLES

pytest.importorskip("nvflare")

APP = EXAMPLES / "stopping" / "app.py"
REASON = "2,304 bytes are sent"


@pytest.mark.network
def test_a_callback_of_ten_lines_stops_a_run_over_the_network(tmp_path):
    call("run", APP, "--out", tmp_path / "simulated")
    out = tmp_path / "network"
    printed = call("run", APP, "--out", out, "--engine", "nvflare")  # which ends with exit code 0
    assert re.search(rf"^Written to .*\nstopped: {REASON}$", printed, re.M)
    outcome = json.loads((out / "outcome.json").read_text())
    assert (outcome["status"], outcome["iterations"], outcome["stopped"]) == ("done", 4, REASON)
    assert [line["stopped"] for line in lines(out / "history.csv")] == ["", "", "", "", REASON]
    same_books(out, tmp_path / "simulated")
    close(out, tmp_path / "simulated", 1e-5)
    compiled_once(out, 3)
    nothing_left(tmp_path)
