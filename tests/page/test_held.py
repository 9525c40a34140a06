"""What clients hold, from the task made again."""

import pytest

import fedbilevel as fb
from fedbilevel.page import found
from fedbilevel.page.held import NETWORK, held
from helpers import folders


def look(tmp_path, **more):
    return found.look(folders.compared(tmp_path / "out", ("lockstep",), (3,), **more))


def test_a_task_is_made_again(tmp_path):
    options = {"dataset": "digits", "partition": "dirichlet", "clients": 5, "alpha": 0.5}
    told = held(look(tmp_path, task="regularisation", options=options))
    data = fb.tasks.TASKS["regularisation"](fb.tasks.Options(**options, seed=3)).data
    assert not isinstance(told, str) and told.labels is not None
    for level in ("inner", "outer"):
        assert told.rows[level].tolist() == data.count(level).tolist()
    assert told.labels.shape == (5, 10) and told.labels.sum() == sum(rows.sum() for rows in told.rows.values())
    assert told.labels.sum(axis=1).tolist() == (told.rows["inner"] + told.rows["outer"]).tolist()


def test_rows_without_labels(tmp_path):
    told = held(look(tmp_path))
    assert not isinstance(told, str) and told.labels is None and told.names[0] == "client 0"


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"engine": "nvflare"}, NETWORK), ({"task": "other"}, "no task"), ({"options": 3}, "no task"),
        ({"options": {"clients": 0}}, "at least 1"), ({"options": {"dataset": "none"}}, "none"),
        ({"options": {"dataset": ["x"]}}, "options that are none"), ({"options": {"partition": "x"}}, "leave --partition"),
    ],
)  # fmt: skip
def test_or_it_is_said_why_not(tmp_path, more, why):
    told = held(look(tmp_path, **more))
    assert isinstance(told, str) and why in told


def test_an_application_is_not_loaded(tmp_path):
    seen = look(tmp_path, app="hospitals")
    del seen.config["task"]
    assert "application" in held(seen)
