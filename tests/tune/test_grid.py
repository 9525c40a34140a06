"""A grid of step sizes in one program gives what single runs give."""

import dataclasses

import jax
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.testing import distance, heterogeneous
from fedbilevel.tune import points, sweep
from helpers.plain import plain


@pytest.mark.parametrize("cohort", [pytest.param(None, marks=pytest.mark.slow), 4])
def test_a_sweep_gives_what_single_runs_give(cohort):
    problem, data, x, y = heterogeneous()
    metrics = {"u": lambda x, y: x["u"][0], "s": lambda x, y: y["deep"]["s"]}
    grid = points({"inner_lr": (0.02, 0.05), "outer_lr": (0.03, 0.1)})
    algorithm = plain(fb.AggITD, inner_rounds=2, local_steps=2, outer_steps=2, batch_size=2, hessian_lr=0.1)
    common = {"key": jax.random.key(3), "engine": fb.Simulation(cohort=cohort), "metrics": metrics}
    single = lambda settings: fb.solve(
        problem, data, dataclasses.replace(algorithm, **settings), x, y, rounds=30, evaluate_every=2, **common
    )
    histories = [single(settings).history for settings in grid]
    for at_once in (4, 3):
        curves = sweep(problem, data, algorithm, grid, x, y, rounds=30, at_once=at_once, evaluate_every=2, **common)
        assert [curve.settings for curve in curves] == grid
        for curve, history in zip(curves, histories, strict=True):
            assert curve.rounds.tolist() == history.column("rounds").tolist()
            for name in metrics:
                assert distance(history.column(name), curve.metrics[name]) < 1e-12
    assert distance(curves[0].metrics["u"], curves[1].metrics["u"]) > 1e-6  # the step sizes do reach the program


def test_a_point_that_blows_up_leaves_the_others_alone():
    problem, data, x, y = heterogeneous()
    algorithm = plain(fb.AggITD, inner_rounds=2, hessian_lr=0.1)
    grid = points({"inner_lr": (0.05, 1e6)})
    good, bad = sweep(problem, data, algorithm, grid, x, y, rounds=70, key=jax.random.key(0),
                      metrics={"s": lambda x, y: y["deep"]["s"]})  # fmt: skip
    assert np.isfinite(good.metrics["s"]).all()
    assert np.isnan(bad.metrics["s"][-1])
