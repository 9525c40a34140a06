"""What TensorBoard would read: every row as points of curves, by iteration and by rounds, and the reason for stopping."""

from __future__ import annotations

import math
import struct
import sys

import pytest

import fedbilevel as fb
from fedbilevel.callbacks import TensorBoard
from fedbilevel.result import EMPTY
from helpers.listening import Told
from helpers.plain import plain

event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
ROWS = [
    {"iteration": 0, "rounds": 0, "bytes_down": 0, "size": 2.5, "turn": EMPTY},
    {"iteration": 1, "rounds": 3, "bytes_down": 80, "size": 1.25, "turn": 0.5},
    {"iteration": 2, "rounds": 6, "bytes_down": 160, "size": math.nan, "turn": 0.25},
]


def events(folder):
    """All events in a folder, in order."""
    found = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data, place = file.read_bytes(), 0
        while place < len(data):  # each: its length, a checksum, the event, a checksum
            (length,) = struct.unpack_from("<Q", data, place)
            found.append(event_pb2.Event.FromString(data[place + 12 : place + 12 + length]))
            place += 16 + length
    return found


def curves(folder):
    """What TensorBoard shows of a folder: by name, {step: value}; a restart drops what was there of its step and later."""
    shown = {}
    for event in events(folder):
        if event.session_log.status == event_pb2.SessionLog.START:
            for curve in shown.values():
                for step in [step for step in curve if step >= event.step]:
                    del curve[step]
        for value in event.summary.value:
            text = value.tensor.string_val
            shown.setdefault(value.tag, {})[event.step] = text[0].decode() if text else value.simple_value
    return {tag: curve for tag, curve in shown.items() if curve}


@pytest.fixture
def run():
    return Told("size")


def test_every_row_is_there(tmp_path, run):
    board = TensorBoard(tmp_path / "board")
    board.start(run)
    run.tell(board, *ROWS)
    run.history.stop("good enough")
    board.finish(run, None)
    for folder, step in ((tmp_path / "board", "iteration"), (tmp_path / "board" / "by-rounds", "rounds")):
        shown = curves(folder)
        assert shown.pop("stopped/text_summary") == {ROWS[-1]["iteration"]: "good enough"}
        shown.pop("algorithm/text_summary", None)
        expected = {
            name: {row[step]: row[name] for row in ROWS if row[name] is not EMPTY} for name in run.history.columns[:-1]
        }
        assert list(shown) == list(expected)
        for name, curve in expected.items():
            assert shown[name] == pytest.approx(curve, nan_ok=True)
    assert "Lockstep(" in curves(tmp_path / "board")["algorithm/text_summary"][0]


def test_rows_that_were_given_up_are_not_shown(tmp_path, run):
    board = TensorBoard(tmp_path)
    board.start(run)
    run.tell(board, *ROWS)
    run.history.give_up(1)
    board.went_back(run)
    run.tell(board, {"iteration": 2, "rounds": 9, "bytes_down": 240, "size": 7.0})
    board.finish(run, None)
    assert curves(tmp_path)["size"] == {0: 2.5, 1: 1.25, 2: 7.0}
    assert curves(tmp_path / "by-rounds")["size"] == {0: 2.5, 3: 1.25, 9: 7.0}


def test_a_run_in_the_same_folder_takes_the_place_of_the_one_before(tmp_path, run):
    for _ in range(2):  # within one second too, as if resumed: with the rows that are there
        board = TensorBoard(tmp_path)
        board.start(run)
        run.tell(board, *ROWS[len(run.history) :])
        board.finish(run, None)
        run.history.give_up(1)
    assert len(list(tmp_path.glob("events*"))) == 2
    assert curves(tmp_path)["rounds"] == {0: 0, 1: 3, 2: 6}


def test_a_run_writes_it(tmp_path):
    task = fb.tasks.quadratic(clients=3)
    result = fb.solve(
        task.problem, task.data, plain(fb.Lockstep), task.x, task.y, 4, key=task.key, metrics=task.metrics,
        callbacks=[TensorBoard(tmp_path)],
    )  # fmt: skip
    shown = curves(tmp_path)
    never = {"vector_growth"}  # taken by other algorithms
    assert set(result.history.columns) - never == set(shown) - {"algorithm/text_summary"}
    for name in ("distance", "rounds", "bytes_up", "hypergradient_norm"):
        taken = {row["iteration"]: row[name] for row in result.history if row[name] is not EMPTY}
        assert shown[name] == pytest.approx(taken, rel=1e-6, nan_ok=True)


def test_without_the_package_it_says_what_to_install(tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(fb.InputError, match=r"TensorBoard needs tensorboardX.*pip install 'fedbilevel\[tensorboard\]'"):
        TensorBoard(tmp_path).start(run)
    assert list(tmp_path.iterdir()) == []
