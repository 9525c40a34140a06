"""Phi as the judge has it: the closed form where there is one; what cannot be judged is infinite."""

import jax
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel_studies.tuning import judge
from fedbilevel_studies.tuning.grounds import GROUNDS


@pytest.mark.slow
def test_the_closed_form_agrees():
    ground = GROUNDS["scaled"]
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        task = ground.build(3, None)
        for x in (task.x, ground.by_hand(task), task.x + 3):
            phi, test = judge.judge(ground, 3, None)(x)
            assert phi == pytest.approx(float(task.metrics["value"](x, task.y)), rel=1e-6)
            assert np.isfinite(test)


def test_what_cannot_be_judged_is_infinite():
    def refused():
        raise fb.InputError("a condition number beyond what 64 bits hold")

    assert judge._safely(refused) == (np.inf, np.inf) and judge._safely(lambda: (1.0, 2.0)) == (1.0, 2.0)
