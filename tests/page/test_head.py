"""Where settings came from; what ran."""

import pytest

from fedbilevel.page import found, head
from helpers import folders


@pytest.mark.parametrize(
    ("steps", "word", "value", "source"),
    [
        ("stored, outer_lr auto", "inner_lr", 0.03, "stored"), ("stored, outer_lr auto", "outer_lr", "auto", "auto"),
        ("auto, hessian_lr and outer_lr given", "outer_lr", 3.0, "given"), ("auto", "inner_lr", "auto", "auto"),
        ("auto, inner_lr given", "inner_lr", 0.1, "given"), ("auto", "local_steps", 5, "default"),
        ("auto", "local_steps", 7, ""), ("the app's own", "local_steps", 7, "the app's own"), ("", "inner_lr", 1.0, ""),
    ],
)  # fmt: skip
def test_where_a_setting_came_from(tmp_path, steps, word, value, source):
    folder = folders.compared(tmp_path / "out", ("lockstep",), (0,), steps={"lockstep": steps})
    assert head.source(found.look(folder), "lockstep", word, value) == source


def test_a_step_that_was_found_has_its_last_value(tmp_path):
    metrics = {**folders.FALLS, "outer_lr": lambda k: 0.125 * k}
    read = folders.Page(head.settings(found.look(folders.compared(tmp_path / "out", ("lockstep",), (0,), metrics))))
    assert "outer_lr auto lately 2.375" in read.text and "inner_lr 0.03 stored" in read.text


def test_versions_and_what_a_race_chose(tmp_path):
    folder = folders.compared(tmp_path / "out", seeds=(0, 1))
    folders.told(folder / "runs" / "lockstep-1", "result.json", folders.head(config={"fedbilevel": "0.2.0"}))
    chosen = {"status": "done", "chosen": {"algorithm": "SimFBO", "settings": {"inner_lr": 0.25}}}
    folders.told(folder / "runs" / "lockstep-0", "outcome.json", chosen)
    seen = found.look(folder)
    assert "fedbilevel 0.1.0, 0.2.0" in folders.Page(head.ran(seen)).text
    assert "chosen SimFBO inner_lr 0.25" in folders.Page(head.settings(seen)).text
    assert head.title(seen) == "quadratic: lockstep, fednest"
