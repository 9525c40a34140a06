"""Searches on a purse whose losses are a formula: nothing is trained, everything is paid."""

import importlib.util

import jax
import numpy as np
import pytest

from fedbilevel_studies.tuning import search
from fedbilevel_studies.tuning.grounds import GROUNDS
from fedbilevel_studies.tuning.purse import Purse

GROUND = GROUNDS["bank"]


class Paper(Purse):
    """A purse of which f falls with the distance of x from a place, and with the rounds in y."""

    def train(self, x, y, rounds):
        self.afford(rounds + 1)
        self.tried = [*getattr(self, "tried", []), (x, rounds)]
        self._pay({"rounds": rounds, "bytes_down": rounds, "bytes_up": 0})
        return (0 if y is self.task.y else y) + rounds

    def value(self, x, y):
        self.afford(1)
        self._pay({"rounds": 1, "bytes_down": 0, "bytes_up": 1})
        return float(sum(np.sum((np.asarray(leaf) - 1) ** 2) for leaf in jax.tree.leaves(x))) + 1 / y


@pytest.fixture(scope="module")
def task():
    return GROUND.build(0, None)


def paper(task, budget=300):
    return Paper(GROUND, task, budget, jax.random.key(0))


def within(x):
    low, high = GROUND.box(x)
    inside = jax.tree.map(lambda a, b, c: bool(np.all((a <= b) & (b <= c))), low, x, high)
    return all(jax.tree.leaves(inside))


@pytest.mark.parametrize(("length", "trials"), [(10, 27), (30, 9), (60, 4)])
def test_random_search_pays_for_whole_runs(task, length, trials):
    own = paper(task)
    search.at_random(own, length, 3)
    assert [rounds for _, rounds in own.tried] == trials * [length]
    assert own.rounds == trials * (length + 1)
    xs = [x for x, _ in own.tried]
    assert all(map(within, xs))
    judge = paper(task, 1_000)
    assert own.best == min(judge.value(x, length) for x in xs) == judge.value(own.trail[-1].x, length)
    again = paper(task)
    search.at_random(again, length, 3)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.trail[-1].x, own.trail[-1].x))
    other = paper(task)
    search.at_random(other, length, 4)
    assert not jax.tree.all(jax.tree.map(np.array_equal, other.tried[1][0], xs[1]))
    assert xs[0] is task.x is other.tried[0][0]  # the start is tried first


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="Optuna is not installed")
def test_tpe_draws_from_the_same_ranges_and_learns(task):
    own, lucky = paper(task, 1_100), paper(task, 1_100)
    search.tpe(own, 10, 0)
    search.at_random(lucky, 10, 0)
    assert len(own.tried) == 100 and own.rounds == 1_100
    assert all(within(x) for x, _ in own.tried)
    assert own.best < lucky.best
    late = [float(np.abs(np.asarray(x["class_weight"]) - 1)) for x, _ in own.tried[50:]]
    early = [float(np.abs(np.asarray(x["class_weight"]) - 1)) for x, _ in own.tried[:10]]
    assert np.median(late) < np.median(early)
