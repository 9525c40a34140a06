"""What the launcher refuses, and what it says of a process that has died. (At work: engines/test_several.py.)"""

from __future__ import annotations

import json

import pytest

import fedbilevel as fb
from fedbilevel.launch.launcher import _ending, _Running, launch
from fedbilevel.processes import CHECKPOINT, GONE, NOTES, RANKS, note
from helpers.checks import unchecked


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for pair in RANKS:
        for name in pair:
            monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"processes": 0}, "--processes is how many to start here, at least 1"),
        ({"processes": 4, "of": 3}, "--of is how many there are in all, at least those started here"),
        ({"processes": 2, "of": 4}, "need --coordinator HOST:PORT"),
        ({"processes": 2, "of": 4, "first": 3, "coordinator": "a:1"}, "processes 3 to 4 are beyond the 4"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(given, sentence, tmp_path):
    script = tmp_path / "script.py"
    script.touch()
    with pytest.raises(fb.InputError, match=sentence):
        launch(script, **given)


def test_a_script_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(fb.InputError, match="there is no script"):
        launch(tmp_path / "script.py")


class _Ended:
    def __init__(self, returncode):
        self.returncode = returncode


def _said(notes, *codes):
    """What is said of processes that ended with these codes, in their order."""
    running = _Running(notes, 4)
    ended = [_Ended(code) for code in codes]
    with unchecked():
        running._started, running._ended = {process: k for k, process in enumerate(ended)}, ended
        return running._sentence()


def test_the_first_that_died_by_itself_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(NOTES, str(tmp_path))
    assert _said(tmp_path, -9, 1).startswith(
        "process 0 of 4 was ended by SIGKILL; all others are ended: there is no checkpoint"
    )
    note(f"{GONE}-0", "")
    (tmp_path / "checkpoint.eqx").write_text(json.dumps({"iteration": 40}) + "\n...")
    note(CHECKPOINT, str(tmp_path / "checkpoint.eqx"))
    assert _said(tmp_path, 1, 3) == (
        f"process 1 of 4 has ended with exit code 3; all others are ended: go on with resume='{tmp_path}', whose "
        "checkpoint is of iteration 40."
    )
    note(f"{GONE}-1", "")
    assert _said(tmp_path, 1, 1).startswith("another process of the run, on another machine, has ended")


def test_how_a_process_has_ended_is_said_in_words():
    assert _ending(0) == "has ended before the others were done (exit code 0)"
    assert (_ending(2), _ending(-6)) == ("has ended with exit code 2", "was ended by SIGABRT")
    assert _ending(-99) == "was ended by signal 99"


def test_without_a_launcher_nothing_is_noted(monkeypatch):
    monkeypatch.delenv(NOTES, raising=False)
    note(CHECKPOINT, "{}")
