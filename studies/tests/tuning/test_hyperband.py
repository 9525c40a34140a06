"""Hyperband's box: its brackets by hand, what goes on pays for what is added, the lowest f is returned."""

import jax
import numpy as np
import pytest

from fedbilevel_studies.tuning import hyperband
from fedbilevel_studies.tuning.grounds import GROUNDS
from fedbilevel_studies.tuning.purse import Purse

GROUND = GROUNDS["scaled"]


class Paper(Purse):
    """Nothing is trained: y is the rounds that it has had, and f falls with them, for each x its own way."""

    def train(self, x, y, rounds):
        self.afford(rounds + 1)
        had = 0 if y is self.task.y else y
        self.log = [*getattr(self, "log", []), (float(np.asarray(x)[0]), had, rounds)]
        self.rounds += rounds
        return had + rounds

    def value(self, x, y):
        self.afford(1)
        self.rounds += 1
        first = float(np.asarray(x)[0])
        return np.inf if first < -8 else abs(first) + 1 / y


def test_the_brackets_of_the_paper():
    # R = 81 r and eta = 3: table 1 of the paper
    paper = [
        [(81, 3), (27, 9), (9, 27), (3, 81), (1, 243)],
        [(34, 9), (11, 27), (3, 81), (1, 243)],
        [(15, 27), (5, 81), (1, 243)],
        [(8, 81), (2, 243)],
        [(5, 243)],
    ]
    assert list(hyperband.brackets(243)) == paper
    assert list(hyperband.brackets(30)) == [[(9, 3), (3, 10), (1, 30)], [(5, 10), (1, 30)], [(3, 30)]]
    assert list(hyperband.brackets(10)) == [[(3, 3), (1, 10)], [(2, 10)]]


def test_the_best_go_on_and_pay_for_what_is_added():
    own = Paper(GROUND, GROUND.build(0, None), 9 * 4 + 3 * 8 + 1 * 21, jax.random.key(0))
    hyperband.hyperband(own, 30, 0)
    assert own.rounds == own.budget == 81
    first, second, third = own.log[:9], own.log[9:12], own.log[12:]
    assert {(had, more) for _, had, more in first} == {(0, 3)}
    assert {(had, more) for _, had, more in second} == {(3, 7)} and third[0][1:] == (10, 20)
    ranked = sorted((x for x, _, _ in first if x >= -8), key=abs)
    assert [x for x, _, _ in second] == ranked[:3] and [x for x, _, _ in third] == ranked[:1]
    assert float(np.asarray(own.trail[-1].x)[0]) == ranked[0]
    assert own.best == pytest.approx(abs(ranked[0]) + 1 / 30)
