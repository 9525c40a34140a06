"""A rival's budget: rounds and bytes are those of the library's ledger, nothing is free."""

import jax
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel_studies.tuning.grounds import GROUNDS
from fedbilevel_studies.tuning.purse import Evaluation, Purse, Spent


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with jax.enable_x64(False):
        yield


def purse(budget, ground=GROUNDS["bank"]):
    return Purse(ground, ground.build(0, None), budget, jax.random.key(1))


def test_a_trial_costs_its_training_and_one_round_that_judges():
    own = purse(23)
    task, key = own.task, jax.random.split(own.key)[1]
    value = own.trial(task.x, 10)
    alone = fb.train(task.problem, task.data, task.x, task.y, rounds=10, key=key)
    last = alone.history[-1]
    numbers, banks = 4 + 16, 5  # x and y go to every bank, which says one number
    assert own.rounds == last["rounds"] + 1 == 11
    judging = 4 * banks * (numbers + 1)
    assert own.bytes == last["bytes_down"] + last["bytes_up"] + judging
    loss = task.metrics["validation_loss"](task.x, alone.y)
    assert value == pytest.approx(float(loss), rel=1e-5)
    assert [(p.rounds, p.bytes) for p in own.trail] == [(0, 0), (11, own.bytes)]
    with pytest.raises(Spent):
        own.trial(task.x, 12)
    assert own.rounds == 11
    assert np.isfinite(own.trial(task.x, 10)) and own.rounds == 22


def test_what_blew_up_is_never_returned_and_a_better_x_is():
    own = purse(10)
    assert own.value(own.task.x, None) == np.inf and own.rounds == 0
    for value in (np.inf, np.nan, 0.5, 0.7, 0.4):
        own.saw(value, value)
    assert [point.x for point in own.trail[1:]] == [0.5, 0.4]


def test_the_exchange_that_judges_is_one_round_with_everybody():
    ground = GROUNDS["hyper-representation"]
    task = ground.build(0, None)
    plan = fb.protocol(Evaluation(), task.problem, task.data, task.x, task.y)
    assert plan.rounds == 1 and plan.bytes_up == 4 * task.data.clients
