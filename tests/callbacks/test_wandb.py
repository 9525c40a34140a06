"""What a run leaves for Weights & Biases, offline: no network, no account, no process."""

from __future__ import annotations

import json
import struct
import sys

import psutil
import pytest

import fedbilevel as fb
from fedbilevel.callbacks import Callback, WeightsAndBiases
from fedbilevel.result import EMPTY
from helpers.plain import plain

wandb = pytest.importorskip("wandb")
TASK = fb.tasks.quadratic(clients=3)


class Enough(Callback):
    """Stops after three iterations."""

    def record(self, run, rows):
        if run.iteration == 3:
            run.stop("good enough")


def solve(*callbacks):
    return fb.solve(
        TASK.problem, TASK.data, plain(fb.Lockstep), TASK.x, TASK.y, 6, key=TASK.key, metrics=TASK.metrics,
        callbacks=callbacks,
    )  # fmt: skip


@pytest.fixture
def offline(monkeypatch):
    """No word from wandb on the screen, and none of its processes left."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()
    names = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert not [name for name in names if "wandb" in name]


def records(folder):
    """The records in the one file that a run leaves, a log in blocks of 32 KiB as LevelDB's."""
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # the end of a run does not wait until its file is whole
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, place, found, part = file.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block has no room for a head
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(part))
            part = b""
    return found


def items(update):
    return {item.key or item.nested_key[0]: json.loads(item.value_json) for item in update}


def test_a_run_leaves_all_its_rows_and_the_reason(tmp_path, offline):
    watch = WeightsAndBiases(project="hospitals", mode="offline", name="first", folder=tmp_path / "kept")
    result = solve(watch, Enough())
    assert result.iteration == 3
    left = records(tmp_path / "kept")
    logged = [items(record.history.item) for record in left if record.HasField("history")]
    assert len(logged) == len(result.history) == 4
    for row, found in zip(result.history, logged, strict=True):
        for name, value in row.items():
            if value is not EMPTY and name != "stopped":
                assert found[name] == pytest.approx(value, rel=1e-6, nan_ok=True)
        assert found["iteration"] == row["iteration"] and "stopped" not in found
    summary = {}
    for record in left:
        summary |= items(record.summary.update)
    assert summary["stopped"] == "good enough" and summary["rounds"] == 3
    (begun,) = [record.run for record in left if record.HasField("run")][:1]
    config = items(begun.config.update)
    assert (begun.project, begun.display_name) == ("hospitals", "first")
    assert config["algorithm"] == "Lockstep" and config["outer_lr"] == 0.05
    assert [record.exit.exit_code for record in left if record.HasField("exit")] == [0]


def test_a_run_that_fails_is_a_failed_one(tmp_path, offline):
    class Fails(Callback):
        def record(self, run, rows):
            raise TypeError("no such thing")

    with pytest.raises(fb.RunError, match="the callback Fails failed"):
        solve(WeightsAndBiases(mode="offline", folder=tmp_path), Fails())
    assert [record.exit.exit_code for record in records(tmp_path) if record.HasField("exit")] == [1]


def test_a_mode_that_there_is_not_is_refused():
    with pytest.raises(fb.InputError, match="there is no mode of wandb 'off': did you mean 'offline'"):
        WeightsAndBiases(mode="off")


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(fb.InputError, match=r"WeightsAndBiases needs wandb.*pip install 'fedbilevel\[wandb\]'"):
        solve(WeightsAndBiases(mode="offline", folder=tmp_path))
