"""What is read of a folder."""

import numpy as np
import pytest

from fedbilevel.errors import InputError
from fedbilevel.page import found
from helpers import folders


def test_runs_are_in_the_order_of_the_configuration(tmp_path):
    seen = found.look(folders.compared(tmp_path / "out", ("simfbo", "aggitd"), (10, 2, 1)))
    assert [(run.algorithm, run.seed) for run in seen.runs] == [
        (a, s) for a in ("simfbo", "aggitd") for s in (1, 2, 10)
    ]
    assert seen.missing == () and len(seen.frame) == 6 * 20 and not seen.tuned


def test_rows_of_the_runs_go_before_those_of_all(tmp_path):
    """The history of all is written when a run ends: that of a run that was killed is older."""
    folder = folders.compared(tmp_path / "out", ("lockstep",), (0, 1))
    folders.history(folder / "history.csv", folders.FALLS, {"algorithm": "lockstep", "seed": 0}, n=3)
    assert [len(run.rows) for run in found.look(folder).runs] == [20, 20]
    for place in (folder / "runs").iterdir():
        (place / "history.csv").unlink()
    seen = found.look(folder)
    assert any("history.csv: no rows" in sentence for sentence in seen.missing)


def test_a_name_with_a_dash_and_a_folder_without_rows(tmp_path):
    folder = folders.compared(tmp_path / "out", ("fedbioacc-local",), (3,))
    (folder / "runs" / "fedbioacc-local-3" / "history.csv").unlink()
    (run,) = found.look(folder).runs
    assert (run.algorithm, run.seed, len(run.rows)) == ("fedbioacc-local", 3, 0)
    assert np.isnan(run.last("value")) and run.totals == {}


def test_rows_that_are_no_numbers_are_left_out(tmp_path):
    folder = folders.compared(tmp_path / "out", ("lockstep",), (0,))
    with (folder / "runs" / "lockstep-0" / "history.csv").open("a") as text:
        text.write("lockstep,0,20,x,,,,\n")
    seen = found.look(folder)
    assert len(seen.frame) == 20
    assert seen.missing == ("runs/lockstep-0/history.csv: 1 rows without rounds, bytes or seconds are left out.",)


def test_what_is_none_of_ours(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        found.look(tmp_path / "nowhere")
    (tmp_path / "runs" / "detect-7").mkdir(parents=True)
    with pytest.raises(InputError, match="no results of ours"):
        found.look(tmp_path)
