"""Curves: medians and ranges, as far as they go; figures of every metric."""

import numpy as np
import pandas
import pytest

from fedbilevel.page import curves, found
from helpers import folders

ROUNDS = curves.Scale("rounds", 1.0, "rounds")


def rows(*seeds):
    """Rows of seeds, each a list of (rounds, value)."""
    return pandas.DataFrame([{"seed": k, "rounds": r, "value": v} for k, own in enumerate(seeds) for r, v in own])


def test_the_median_and_the_range():
    line = lambda level: [(r, level) for r in range(5)]
    found_ = curves.curve(rows(line(1.0), line(2.0), line(9.0)), ROUNDS, "value", 100)
    assert found_ is not None
    np.testing.assert_array_equal(found_.across, range(5))
    assert [set(part) for part in found_[1:]] == [{2.0}, {1.0}, {9.0}]


@pytest.mark.parametrize(("ends", "end"), [((10, 10, 2), 10), ((10, 9, 8), 8), ((10, 1), 10), ((7,), 7), ((0, 0), 0)])
def test_a_seed_that_ended_early_does_not_cut_the_others(ends, end):
    found_ = curves.curve(rows(*[[(r, 1.0) for r in range(last + 1)] for last in ends]), ROUNDS, "value", 100)
    assert found_ is not None and found_.across[-1] == end and np.isfinite(found_.middle).all()


def test_what_is_not_finite_is_not_drawn():
    found_ = curves.curve(rows([(0, 1.0), (1, np.inf), (2, np.nan), (3, 1e200), (4, 2.0)]), ROUNDS, "value", 100)
    assert found_ is not None and found_.across.tolist() == [0, 4]
    assert curves.curve(rows([(0, np.nan)]), ROUNDS, "value", 100) is None


def test_long_runs_are_thinned():
    found_ = curves.curve(rows([(r, r) for r in range(5000)]), ROUNDS, "value", 50)
    assert found_ is not None and len(found_.across) <= 50 and found_.across[[0, -1]].tolist() == [0, 4999]


def test_every_metric_has_a_figure_and_steps_and_diagnostics_stand_apart(tmp_path):
    metrics = {**folders.FALLS, "error": lambda k: 10.0**-k, "inner_lr": lambda k: 0.1, "turn": lambda k: 0.5}
    seen = found.look(folders.compared(tmp_path / "out", metrics=metrics))
    assert curves.columns(seen) == (["value", "error"], ["inner_lr"], ["turn"])
    read = folders.Page(curves.curves(seen))
    figures = [svg for svg in read.pictures if "against" in svg.get("aria-label", "")]
    assert len(figures) == 4 and "error (log)" in read.text and "value (log)" not in read.text
    assert [len(svg.findall("polyline")) for svg in figures] == [6] * 4
    for svg in figures:
        width, height = map(float, svg.get("viewBox").split()[2:])
        spots = [spot for line in svg.findall("polyline") for spot in line.get("points").split()]
        assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in (spot.split(",") for spot in spots))


def test_algorithms_whose_steps_nobody_chose_are_marked(tmp_path):
    steps = {"lockstep": "stored", "fednest": "auto"}
    read = folders.Page(curves.legend(found.look(folders.compared(tmp_path / "out", steps=steps))))
    assert read.text == "lockstep fednest (auto)"


def test_more_algorithms_than_colours_are_told_apart():
    assert len({curves.look(k) for k in range(24)}) == 24


def test_where_candidates_of_a_race_were_dropped(tmp_path):
    folder = folders.compared(tmp_path / "out", ("tune",), (0,))
    (folder / "candidates.csv").write_text("name,algorithm,tempo,score,round,why\na,A,1,2,,\nb,B,1,3,10,worse\n")
    assert curves.curves(found.look(folder)).count('class="mark"') == 3


def test_a_folder_without_rows(tmp_path):
    folders.told(tmp_path / "out", "config.json", folders.config())
    assert "No rows yet." in curves.curves(found.look(tmp_path / "out"))
