"""Who takes part: whom the issue of a fair comparison names, each with its run lengths."""

import jax
import numpy as np

from fedbilevel_studies.tuning import contenders
from fedbilevel_studies.tuning.grounds import GROUNDS
from fedbilevel_studies.tuning.plan import QUICK, WHOLE
from fedbilevel_studies.tuning.purse import Purse


class Free(Purse):
    def train(self, x, y, rounds):
        self.trained = x, rounds
        self.rounds += rounds
        return y


def test_searches_have_the_best_of_three_lengths():
    labels = [c.label for c in contenders.CONTENDERS]
    assert labels == ["no tuning", "by hand", "random search", "TPE", "Hyperband", "FedEx", "ours", "fb.tune"]
    lengths = {c.label: c.lengths for c in contenders.CONTENDERS}
    assert all(lengths[name] == (10, 30, 60) for name in ("random search", "TPE", "Hyperband"))
    runs = WHOLE.runs()
    assert len(runs) == 5 * (6 * 15 - 1)  # nobody sets a body by hand
    assert set(labels) - set(contenders.RIVALS) == {"ours", "fb.tune"}
    assert {ground.name for ground, *_ in QUICK.runs()} == {"bank"}


def test_what_is_fixed_trains_once_and_is_there_from_the_start():
    ground = GROUNDS["bank"]
    task = ground.build(0, None)
    for contender in contenders.CONTENDERS[:2]:
        own = Free(ground, task, 300, task.key)
        contender.run(own, 0, 0)
        (point,) = own.trail
        assert point.rounds == 0 and own.rounds == 100
        assert own.trained[0] is point.x
    assert float(point.x["class_weight"]) == 0 and np.all(np.asarray(point.x["penalty"]) < 0)


def test_ours_that_is_told_nothing_spends_the_budget_in_one_run():
    ground = GROUNDS["bank"]
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):  # as users have it
        task = ground.build(0, None)
        own = Purse(ground, task, 60, task.key)
        contenders.tuned(own)
    assert 55 <= own.rounds <= 60 and own.trail[0].rounds == 0
    rounds, bytes_ = ([getattr(point, name) for point in own.trail] for name in ("rounds", "bytes"))
    assert rounds == sorted(rounds) and bytes_ == sorted(bytes_) and bytes_[-1] == own.bytes
