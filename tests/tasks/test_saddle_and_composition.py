"""Minimax and compositional problems: closed forms in numpy, and the same algorithms on them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import fedbilevel as fb


def means(task, level):
    """The mean over clients of the mean over a client's rows, by name."""
    each = [getattr(task.data, level).alone(i).rows for i in range(task.data.clients)]
    return {name: np.mean([np.mean(rows[name], axis=0) for rows in each], axis=0) for name in each[0]}


def closed_form(name, task):
    """(x -> y*(x), x -> grad Phi(x), the best x)."""
    if name == "minimax":
        A, b = means(task, "inner").values()
        c = 0.1
        lower, slope = (lambda x: A @ x - b), (lambda x: A.T @ (A @ x - b) + c * x)
        return lower, slope, np.linalg.solve(A.T @ A + c * np.eye(A.shape[1]), A.T @ b)
    (R, s), t, c = means(task, "inner").values(), means(task, "outer")["t"], 0.1
    lower, slope = (lambda x: R @ x + s), (lambda x: R.T @ (R @ x + s - t) + c * x)
    return lower, slope, np.linalg.solve(R.T @ R + c * np.eye(R.shape[1]), R.T @ (t - s))


NAMES = ("minimax", "compositional")
STEPS = {"inner_lr": 0.2, "hessian_lr": 0.5, "outer_lr": 0.1}
SOLVERS = {
    "aggitd": (fb.AggITD(**STEPS, inner_rounds=3, local_steps=3, truncation="full", warm_start_v=True), 2000),
    "fednest": (fb.FedNest(**STEPS, inner_rounds=15, local_steps=3, neumann_terms=40, truncation="full"), 2000),
    "lockstep": (fb.Lockstep(**STEPS, local_steps=3), 3000),
    "simfbo": (fb.SimFBO(**{**STEPS, "outer_lr": 0.05}, local_steps=1), 6000),
    "fedf2sa": (fb.FedF2SA(inner_lr=0.2, outer_lr=0.05, local_steps=3, inner_rounds=10, penalty=1e5), 3000),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_closed_form_is_the_references(name):
    task = fb.tasks.TASKS[name](seed=3, clients=5)
    lower, slope, best = closed_form(name, task)
    problem, data, x, y = task.problem, task.data, task.x, task.y
    np.testing.assert_allclose(fb.reference.solution(problem, data, x, y), lower(x), atol=1e-10)
    np.testing.assert_allclose(fb.reference.hypergradient(problem, data, x, y), slope(x), atol=1e-10)
    np.testing.assert_allclose(slope(best), 0, atol=1e-12)
    assert float(task.metrics["stationarity"](x, y)) == pytest.approx(np.sum(slope(x) ** 2))
    assert float(task.metrics["distance"](best, lower(best))) < 1e-18


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_algorithms_find_it(name, solver):
    task = fb.tasks.TASKS[name]()
    lower, _, best = closed_form(name, task)
    algorithm, iterations = SOLVERS[solver]
    result = fb.solve(
        task.problem, task.data, algorithm, task.x, task.y, iterations, key=jax.random.key(0), evaluate_every=iterations
    )
    near = 1e-4 if solver == "fedf2sa" else 1e-7
    assert np.abs(np.asarray(task.x) - best).max() > 0.1
    np.testing.assert_allclose(result.x, best, rtol=0, atol=near)
    np.testing.assert_allclose(result.y, lower(best), rtol=0, atol=near)


def test_the_levels_of_the_saddle_are_opposed():
    task = fb.tasks.TASKS["minimax"]()
    row = {name: leaf[0] for name, leaf in task.data.inner.rows.items()}
    inner, outer = task.problem.inner(task.x, task.y + 1, row), task.problem.outer(task.x, task.y + 1, row)
    assert float(inner) == -float(outer) != 0


@pytest.mark.parametrize("name", NAMES)
def test_they_make_their_own_clients(name):
    assert fb.tasks.TASKS[name](clients=3).data.clients == 3
    with pytest.raises(fb.InputError, match=f"the {name} task makes its own clients"):
        fb.tasks.TASKS[name](partition="shards")
