"""How runs ended, in a word and a sentence."""

import pytest

from fedbilevel.page import found
from fedbilevel.page.ended import ended, how
from helpers import folders

BLEW_UP = "Lockstep blew up in iteration 3: x left the finite range."


@pytest.mark.parametrize(
    ("outcome", "word", "why"),
    [
        ({"status": "done", "iterations": 19}, "done", ""),
        ({"status": "done", "iterations": 9}, "done", "at iteration 9; it went on, and has not ended since"),
        ({"status": "done", "iterations": 19, "stopped": "no better"}, "stopped", "no better"),
        ({"status": "done", "iterations": 19, "resumed_at": 4}, "done", "resumed at iteration 4"),
        ({"status": "done", "best": {"iteration": 3, "rounds": 6, "value": 0.5}}, "done", "the best, 0.5, at iteration 3"),
        ({"status": "failed", "sentence": BLEW_UP}, "diverged", BLEW_UP),
        ({"status": "failed", "sentence": "site-1 did not answer."}, "failed", "site-1 did not answer."),
        ({"status": "interrupted", "iterations": 19}, "interrupted", ""),
        ({"status": "running"}, "running", "or killed"),
        ({}, "not ended", "no outcome.json: killed, or it still runs"),
    ],
)  # fmt: skip
def test_each_end(tmp_path, outcome, word, why):
    folder = folders.compared(tmp_path / "out", ("lockstep",), (0,))
    folders.told(folder / "runs" / "lockstep-0", "outcome.json", outcome)
    seen = found.look(folder)
    assert how(seen.runs[0]) == (word, why)
    assert " ".join(f"lockstep 0 19 38 {word} {why}".split()) in folders.Page(ended(seen)).text


def test_of_many_runs_those_that_did_not_just_end_come_first(tmp_path):
    folder = folders.compared(tmp_path / "out", ("a", "b"), range(40))
    folders.told(folder / "runs" / "b-33", "outcome.json", {"status": "failed", "sentence": "gone."})
    read = folders.Page(ended(found.look(folder)))
    assert read.text.startswith("seed iteration round b 33") and "20 more runs: done." in read.text


def test_who_raced(tmp_path):
    folder = folders.compared(tmp_path / "out", ("tune",), (0,))
    (folder / "candidates.csv").write_text("name,algorithm,tempo,score,round,why\na,A,1.0,2.5,,\nb,B,4.0,,20,worse\n")
    read = folders.Page(ended(found.look(folder)))
    assert "a 1.0 2.5 never b 4.0 - round 20 worse" in read.text
    (folder / "candidates.csv").write_text("x\n\x00")
    assert "Candidates" in ended(found.look(folder)) or "cannot be read" in ended(found.look(folder))
