"""Callbacks of an application: the same in every engine, and what the command line tells of a run that they stop."""

from __future__ import annotations

import json

import pytest

import fedbilevel as fb
from fedbilevel.app import load_app
from helpers import apps
from helpers.network import lines
from helpers.places import EXAMPLES

STOPPING = EXAMPLES / "stopping" / "app.py"
REASON = "2,304 bytes are sent"
TWO = "iterations=2, algorithm=fb.Lockstep(inner_lr=0.02, hessian_lr=0.02, outer_lr=0.1), "


def test_the_callback_of_the_page_takes_ten_lines():
    text = STOPPING.read_text().partition("class Spent")[2].partition("\n\n\n")[0]
    assert len(text.splitlines()) == 10


@pytest.mark.parametrize("engine", ["simulation", "loopback"])
def test_an_app_is_stopped_and_the_last_line_says_why(fedbilevel, tmp_path, engine):
    out = tmp_path / "out"
    code, printed, errors = fedbilevel("run", STOPPING, "--engine", engine, "--out", out)
    assert code == 0, errors
    assert printed.splitlines()[-1] == f"stopped: {REASON}" and "stopped" not in printed.partition("Written to")[0]
    assert [row["stopped"] for row in lines(out / "history.csv")] == ["", "", "", "", REASON]
    outcome = json.loads((out / "outcome.json").read_text())
    assert (outcome["status"], outcome["iterations"], outcome["stopped"]) == ("done", 4, REASON)

    code, printed, errors = fedbilevel("run", STOPPING, "--engine", engine, "--out", out, "--resume", "--json")
    told = json.loads(printed)
    assert code == 0 and (told["iteration"], told["stopped"]) == (5, "2,880 bytes are sent")  # at its next row
    assert errors.splitlines()[-1] == "stopped: 2,880 bytes are sent"


def test_the_folder_of_a_run_that_was_stopped_is_plotted_and_priced(fedbilevel, tmp_path):
    file, out = tmp_path / "app.py", tmp_path / "out"
    metrics = "metrics={'test_accuracy': lambda x, y: y[0]}, "
    file.write_text(STOPPING.read_text().replace("    callbacks=", f"    {metrics}callbacks="))
    for words in (("run", file, "--out", out), ("plot", out), ("cost", out, "--network", "all")):
        code, _, errors = fedbilevel(*words)
        assert code == 0, errors
    assert {figure.name for figure in out.glob("*.png")} == {"test_accuracy.png", "cost.png"}
    assert "stopped" not in (out / "summary.csv").read_text() + (out / "cost.csv").read_text()


def test_one_that_nobody_stops_says_nothing_of_it(fedbilevel, tmp_path):
    file = apps.write(tmp_path, apps.CLOSED_FORM, TWO + "callbacks=[fb.callbacks.Callback()]")
    code, printed, errors = fedbilevel("run", file, "--out", tmp_path / "out")
    assert code == 0 and "stopped" not in printed + errors
    assert "stopped" not in json.loads((tmp_path / "out" / "outcome.json").read_text())


def test_a_comparison_says_of_each_run_what_stopped_it(fedbilevel, tmp_path):
    words = ("compare", STOPPING, "--algorithms", "lockstep,fedmsa", "--seeds", 1, "--out", tmp_path / "out")
    code, printed, errors = fedbilevel(*words)
    assert code == 0, errors
    told = printed.splitlines()[-2:]
    assert told[0] == f"stopped: {REASON} (lockstep, seed 0)" and told[1].endswith("bytes are sent (fedmsa, seed 0)")
    code, printed, errors = fedbilevel(*words, "--json", "--overwrite")
    assert code == 0 and errors.splitlines()[-2:] == told and len(json.loads(printed)) == 2


def test_a_callback_that_fails_leaves_the_results(fedbilevel, tmp_path):
    fails = "callbacks=lambda: [type('Fails', (fb.callbacks.Callback,), {'record': lambda self, run, rows: rows[9]})()]"
    file, out = apps.write(tmp_path, apps.CLOSED_FORM, TWO + fails), tmp_path / "out"
    code, _, errors = fedbilevel("run", file, "--out", out)
    assert code == 1
    assert errors.splitlines()[-1] == "fedbilevel: the callback Fails failed: IndexError: list index out of range"
    assert (out / "checkpoint.eqx").is_file() and (out / "variables.npz").is_file()
    assert len(lines(out / "history.csv")) == 1


@pytest.mark.parametrize("callbacks", ["3", "[3]", "{}"])
def test_what_is_no_callback_is_refused(tmp_path, callbacks):
    file = apps.write(tmp_path, apps.CLOSED_FORM, f"{TWO}callbacks={callbacks}")
    with pytest.raises(fb.InputError, match=r"App\(callbacks=...\) is a list of callbacks, or a function"):
        load_app(file)


def test_a_function_that_fails_is_told_before_anything_runs(fedbilevel, tmp_path):
    file = apps.write(tmp_path, apps.CLOSED_FORM, TWO + "callbacks=lambda: 1 / 0")
    code, _, errors = fedbilevel("run", file, "--out", tmp_path / "out")
    assert code == 2 and "the function in callbacks= failed: ZeroDivisionError" in errors
    assert list((tmp_path / "out").iterdir()) == []
