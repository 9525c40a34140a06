"""The search for step sizes: grids are judged by hand-made curves, and go on until nothing beside is better."""

import dataclasses

import numpy as np
import pandas
import pytest

from fedbilevel.tune.grid import points
from fedbilevel_studies import search
from helpers.small_study import SMALL


def test_runs_are_judged_by_the_median_of_five():
    rounds = np.arange(8) * 10
    falling = np.array([1.0, 0.9, 0.6, 0.9, 0.69, 0.69, 0.69, 0.5])
    assert search.judge(SMALL, rounds, falling, 30) == (50.0, 50.0)  # one lucky evaluation does not count
    at, score = search.judge(SMALL, rounds, np.array([0.6] * 5 + [0.9] * 3), 30)  # nor does a run that falls back
    assert (at, score) == (40.0, pytest.approx(30 * (1 + 0.2 / 0.7)))
    at, score = search.judge(SMALL, rounds, falling + 0.7, 30)
    assert at == np.inf
    assert score == pytest.approx(30 * (1 + 0.69 / 0.7))  # how far the last median, 1.39, is from the goal
    assert search.judge(SMALL, rounds, np.full(8, np.nan), 30)[1] > score


def test_the_neighbours_of_a_point():
    tried = points({"inner_lr": (0.1, 0.3), "outer_lr": (1 / 3, 1.0, 2.0), "hessian_lr": (0.05,)})
    best = {"inner_lr": 0.3, "outer_lr": 1 / 3, "hessian_lr": 0.05}
    beyond = [best | {"inner_lr": 0.9}, best | {"outer_lr": 0.111111}]  # by the ratio of the last two
    assert search.neighbours(best, tried, best) == beyond
    found = search.neighbours(beyond[0], [*tried, *beyond], best)  # beside it nothing but the old best was tried
    assert [point["inner_lr"] for point in found] == [2.7, 0.9, 0.9]
    assert [point["outer_lr"] for point in found] == [1 / 3, 0.111111, 1.0]


def test_a_grid_goes_on_until_no_neighbour_is_better(tmp_path, monkeypatch):
    low = {"inner_lr": (0.001, 0.002), "hessian_lr": (0.05,), "outer_lr": (0.5, 2.0)}
    first = dataclasses.replace(
        SMALL.contenders[0], label="another", variants=({"inner_rounds": 1}, {"inner_rounds": 3})
    )
    one = dataclasses.replace(SMALL, contenders=(first, SMALL.contenders[1]), grid=low, beyond=9)
    batches, room = [], [1000]  # what was tried, and how often more may be tried

    def score(self, points, seed, rounds, soonest, whole):
        """A valley whose bottom is far from where the grid begins, and moves with the seed and the variant."""
        if len(batches) == room[0]:
            raise KeyboardInterrupt
        batches.append((self.contender.label, seed, len(points)))
        off = lambda p: np.log(p["inner_lr"] / 0.03) ** 2 + 0.1 * np.log(p["outer_lr"] / (0.04 * seed)) ** 2
        own = {"label": self.contender.label, "seed": seed}
        return [own | p | {"score": off(p) + 0.3 * p.get("neumann_terms", 0)} for p in points]

    monkeypatch.setattr(search._Grid, "_try", score)
    monkeypatch.setattr(search, "release", lambda: None)  # nothing is compiled here, and counting maps takes its time
    found = search.search(one, tmp_path, None, print)
    whole, count = (tmp_path / "grid.csv").read_text(), len(batches)
    rows = pandas.read_csv(tmp_path / "grid.csv")
    mine = rows[(rows["label"] == "FedNest") & (rows["seed"] == 10)]
    tried = mine[["neumann_terms", *low]].to_dict("records")
    top = tried[int(mine["score"].argmin())]
    assert (top["inner_lr"], top["outer_lr"]) == (pytest.approx(0.032), 0.5)
    assert search.neighbours(top, tried, low) == []  # all of them were tried, and are no better
    assert found["FedNest"] in tried
    assert [entry for entry in batches if entry[1] == 11] == [("another", 11, 2), ("FedNest", 11, 2)]
    assert found == search.search(one, tmp_path, None, print)
    assert len(batches) == count  # everything was kept
    for room[0] in range(count):  # interrupted before each batch
        (tmp_path / "grid.csv").unlink()
        batches.clear()
        with pytest.raises(KeyboardInterrupt):
            search.search(one, tmp_path, None, print)
        room[0], done = 1000, len(batches)
        assert search.search(one, tmp_path, None, print) == found
        assert len(batches) == count > done
        assert (tmp_path / "grid.csv").read_text() == whole


@pytest.mark.parametrize(("unstable", "looked_at", "chosen"), [(0, 2, 0), (1, 2, 1), (3, 4, 3), (6, 6, 0)])
def test_a_second_look_goes_on_until_a_point_holds(tmp_path, monkeypatch, unstable, looked_at, chosen):
    # the soonest come first, and blow up on one of the other seeds
    rates = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06)
    alone = dataclasses.replace(SMALL.contenders[1], variants=({},))
    one = dataclasses.replace(
        SMALL, contenders=(alone,), grid={"inner_lr": rates, "hessian_lr": (0.05,), "outer_lr": (1.0,)},
        beyond=0, shortlist=2, shortlist_seeds=(11, 12),
    )  # fmt: skip
    again = set()

    def score(self, points, seed, rounds, soonest, whole):
        if whole:
            again.update(point["inner_lr"] for point in points)
        blown = lambda p: whole and seed == 12 and rates.index(p["inner_lr"]) < unstable
        own = {"label": self.contender.label, "seed": seed}
        return [own | p | {"score": 11.0 * rounds if blown(p) else 100 * p["inner_lr"]} for p in points]

    monkeypatch.setattr(search._Grid, "_try", score)
    monkeypatch.setattr(search, "release", lambda: None)
    found = search.search(one, tmp_path, None, print)[one.contenders[0].label]
    assert (len(again), found["inner_lr"]) == (looked_at, rates[chosen])
