"""Who takes part: whom the issue of a fair comparison names, each with its run lengths."""

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
    assert labels == ["no tuning", "by hand", "random search", "TPE", "Hyperband", "FedEx", "ours"]
    lengths = {c.label: c.lengths for c in contenders.CONTENDERS}
    assert all(lengths[name] == (10, 30, 60) for name in ("random search", "TPE", "Hyperband"))
    runs = WHOLE.runs()
    assert len(runs) == 5 * (6 * 14 - 1)  # nobody sets a body by hand
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
