"""Random problems in any units: what is known of them is what the reference finds, and units change nothing."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel import reference
from fedbilevel.random_problems import CLIENTS, CONDITION, FACTORS, MODES
from fedbilevel.testing import random_problem
from helpers.differences import moved

PROBLEMS = [random_problem(seed) for seed in range(60)]


@pytest.mark.parametrize("kind", ["quadratic", "logistic"])
def test_what_is_known_is_what_the_reference_finds(kind):
    small = [p for p in PROBLEMS if p.kind == kind and p.data.clients < 12]
    p = max(small, key=lambda p: np.abs(np.log(p.factors)).max())
    x = p.factors[0] * np.asarray(moved(p.x / p.factors[0], size=0.3))
    assert p.value(x) == pytest.approx(float(reference.value(p.problem, p.data, x, p.y)), rel=1e-8)
    assert p.outer_value(x, p.y) == pytest.approx(float(reference.outer_value(p.problem, p.data, x, p.y)), rel=1e-10)
    differences = [
        (p.value(x + step) - p.value(x - step)) / (2e-5 * p.factors[0]) for step in 1e-5 * p.factors[0] * np.eye(len(x))
    ]
    np.testing.assert_allclose(p.hypergradient(x), differences, rtol=1e-5, atol=1e-6 * np.abs(differences).max())


def test_the_mean_curvature_at_the_start_has_a_bounded_condition():
    conditions = [np.linalg.cond(p.model.hessian(p.model.x, p.model.y)) for p in PROBLEMS]
    assert max(conditions) <= CONDITION * (1 + 1e-9)
    assert max(conditions) > 100 and min(conditions) < 10


def test_clients_modes_and_factors_are_those_asked_for():
    assert {p.mode for p in PROBLEMS} == set(MODES)
    assert [p.kind for p in PROBLEMS[:2]] == ["quadratic", "logistic"]
    for p in PROBLEMS:
        assert CLIENTS[0] <= p.data.clients <= CLIENTS[1]
        assert (p.engine.cohort is not None) == ("cohort" in p.mode)
        assert p.engine.cohort is None or 1 <= p.engine.cohort < p.data.clients
        assert (p.batch_size is not None) == ("minibatches" in p.mode)
    assert any(len(set(p.data.count("inner"))) > 1 for p in PROBLEMS)
    factors = np.array([p.factors for p in PROBLEMS])
    assert FACTORS[0] <= factors.min() < 0.01 and 100 < factors.max() <= FACTORS[1]


def test_units_move_start_and_solution_along():
    p, same = PROBLEMS[0], random_problem(0)
    assert p.factors == same.factors and p.engine == same.engine and p.batch_size == same.batch_size
    np.testing.assert_array_equal(p.x, same.x)
    np.testing.assert_allclose(p.x, p.factors[0] * p.model.x)
    start = p.value(p.x)
    assert start == pytest.approx(p.factors[2] ** 2 * p.model.value(p.model.x))
    slope = p.hypergradient(p.x)
    near = p.value(p.x - 1e-4 * p.factors[0] * slope / np.linalg.norm(slope))
    assert near < start


def test_a_run_starts_where_it_says():
    p = min(PROBLEMS, key=lambda p: p.data.clients)
    steps = {"inner_lr": 1e-30, "hessian_lr": 1e-30, "outer_lr": 1e-30}
    algorithm = fb.Lockstep(local_steps=1, batch_size=p.batch_size, **steps)
    run = fb.solve(p.problem, p.data, algorithm, p.x, p.y, 1, key=jax.random.key(0), engine=p.engine, check=False)
    assert p.outer_value(run.x, run.y) == pytest.approx(p.outer_value(p.x, p.y))


def test_a_value_that_is_not_finite_is_infinite():
    for p in PROBLEMS[:2]:
        assert p.value(np.full(len(p.x), np.nan)) == np.inf
