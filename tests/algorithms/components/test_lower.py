"""The lower loops on a heterogeneous quadratic: where they lead, how fast, and when they diverge (algorithms.md 6.2).

The corrected loop is y^{t+1} - y* = (I - S H)(y^t - y*), S = mean_i b sum_{s < tau} (I - b H_i)^s: y* for every tau. Plain
local steps end where mean_i b sum_{s < tau} (I - b H_i)^s (H_i y - k_i) = 0, which is elsewhere from tau = 2 on.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fedbilevel as fb
from fedbilevel.algorithm import component
from fedbilevel.algorithms.components.lower import CorrectedLower, LocalLower
from helpers.plain import RATES
from helpers.quadratic import DY, estimate, flat, orthogonal, power, quadratic

Q0 = quadratic()
T, Z, BEST = Q0.t, Q0.z, Q0.solution(Q0.t)
LARGEST = np.linalg.eigvalsh(Q0.hessians(T)).max()  # L, over clients
STEPS = (1, 2, 5, 20)


class Corrected(fb.Algorithm):
    """One turn of the corrected lower loop an iteration; x stays."""

    inner_lr: Any = fb.rate(0.01)
    local_steps: int = fb.count(5)

    @component
    def lower(self):
        return CorrectedLower(1, self.inner_lr, self.local_steps)

    def step(self, fed, state):
        return fb.State(state.x, self.lower.rounds(fed, state.x, state.y)[0]), {}


class Local(fb.Algorithm):
    """One turn of plain local steps an iteration; x stays."""

    inner_lr: Any = fb.rate(0.01)
    local_steps: int = fb.count(5)

    @component
    def lower(self):
        return LocalLower(1, self.inner_lr, self.local_steps)

    def step(self, fed, state):
        return fb.State(state.x, self.lower.rounds(fed, state.x, state.y)[0]), {}


def run(q, algorithm, start, turns):
    y = ravel_pytree(q.y)[1](np.asarray(start))
    return flat(fb.solve(q.problem, q.data, algorithm, q.x, y, turns, key=jax.random.key(0), evaluate_every=turns).y)


def radius(matrix):
    return np.abs(np.linalg.eigvals(matrix)).max()


def turns_needed(matrix, accuracy=1e-13):
    """How many turns bring the error down by `accuracy`, from the map itself."""
    assert radius(matrix) < 1
    return int(np.ceil(np.log(accuracy) / np.log(radius(matrix)))) + 50


@pytest.mark.parametrize("steps", STEPS)
def test_the_corrected_loop_leads_to_the_solution_or_diverges_as_its_map_says(steps):
    lr = 1 / (steps * LARGEST)
    P = Q0.corrected_map(T, lr, steps)
    algorithm = Corrected(inner_lr=lr, local_steps=steps)
    np.testing.assert_allclose(run(Q0, algorithm, BEST, 1), BEST, rtol=0, atol=1e-12)  # y* stays
    np.testing.assert_allclose(run(Q0, algorithm, Z, 7), BEST + power(P, 7) @ (Z - BEST), rtol=0, atol=1e-12)
    np.testing.assert_allclose(run(Q0, algorithm, Z, turns_needed(P)), BEST, rtol=0, atol=1e-11)

    worst = orthogonal(Q0)  # the same compiled program
    mean = np.linalg.eigvalsh(worst.hessians(T).mean(0)).max()
    stable, unstable = 1.2 / (steps * mean), 5 / (steps * mean)
    best, P = worst.solution(T), worst.corrected_map(T, stable, steps)
    end = run(worst, Corrected(inner_lr=stable, local_steps=steps), Z, turns_needed(P))
    np.testing.assert_allclose(end, best, rtol=0, atol=1e-10)
    assert radius(worst.corrected_map(T, unstable, steps)) > 1
    with pytest.raises(fb.Diverged, match="inner_lr") as failure:
        run(worst, Corrected(inner_lr=unstable, local_steps=steps), Z, 10_000)
    assert np.isfinite(flat(failure.value.result.y)).all()


def test_a_step_below_one_over_the_curvature_is_not_enough():
    """b <= 1/L and b tau L_g < 2 together suffice; with b = 1/L alone, 20 steps a turn diverge."""
    worst = orthogonal(Q0)
    hessians = worst.hessians(T)
    largest, mean = np.linalg.eigvalsh(hessians).max(), np.linalg.eigvalsh(hessians.mean(0)).max()
    for steps in STEPS:
        sufficient = min(1 / largest, 1.99 / (steps * mean))
        assert radius(worst.corrected_map(T, sufficient, steps)) < 1
    assert radius(worst.corrected_map(T, 1 / largest, 20)) > 1
    with pytest.raises(fb.Diverged):
        run(worst, Corrected(inner_lr=1 / largest, local_steps=20), Z, 10_000)


@pytest.mark.parametrize("steps", STEPS[:3])
def test_plain_local_steps_lead_elsewhere(steps):
    lr = 1 / (steps * LARGEST)
    K, k = Q0.local_map(T, lr, steps)
    elsewhere = np.linalg.solve(np.eye(DY) - K, k)
    end = run(Q0, Local(inner_lr=lr, local_steps=steps), Z, turns_needed(K))
    np.testing.assert_allclose(end, elsewhere, rtol=0, atol=1e-11)
    off = np.linalg.norm(end - BEST) / np.linalg.norm(BEST)
    if steps == 1:
        assert off < 1e-11  # one step is a step along the mean gradient
    else:
        assert off > 1e-2


def test_fednest_sgd_runs_the_plain_loop():
    """(AggITD's and FedNest's own loops are the corrected one: test_estimator.py.)"""
    lr, steps, turns = 1 / (2 * LARGEST), 2, 40
    K, k = Q0.local_map(T, lr, steps)
    elsewhere = np.linalg.solve(np.eye(DY) - K, k)
    plain = elsewhere + power(K, turns) @ (Z - elsewhere)
    assert np.abs(plain - Q0.corrected_path(T, Z, lr, steps, turns)[-1]).max() > 1e-2
    y = estimate(
        Q0, fb.FedNestSGD(**RATES | {"inner_lr": lr}, inner_rounds=turns, local_steps=steps, truncation="full")
    )[1]
    np.testing.assert_allclose(y, plain, rtol=0, atol=1e-12)
