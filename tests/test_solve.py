"""`solve`: its history and ledgers, budgets of rounds, modules as variables, and one compilation for all of it."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from helpers.plain import RATES
from helpers.quadratic import flat

KEY = jax.random.key(0)
LEDGER = ("rounds", "bytes_down", "bytes_up")


def inner(x, y, e):
    return 0.5 * jnp.sum((y - e * x) ** 2) + 0.05 * jnp.sum(y**2)


def outer(x, y, e):
    return 0.5 * jnp.sum((y - e) ** 2) + 0.1 * jnp.sum(x**2)


PROBLEM = fb.Problem(inner, outer)
ROWS = [np.full((2, 2), 1.0 + i) + np.eye(2) for i in range(4)]
DATA = fb.FederatedData.stack(ROWS, ROWS)
X, Y = jnp.asarray([0.3, 0.1]), jnp.asarray([0.5, -0.2])
NEST = fb.FedNest(inner_rounds=2, inner_lr=0.1, local_steps=2, neumann_terms=3, hessian_lr=0.1, outer_lr=0.05)
PER_ITERATION = {2 * 2 + n + 3 for n in range(3)}  # its rounds: 2T + N' + 3
SIMULATION = fb.Simulation(cohort=2)
METRICS = {"size": lambda x, y: jnp.sum(x**2), "gap": lambda x, y: float(abs(x[0] - y[0]))}


def solve(iterations=None, algorithm=NEST, problem=PROBLEM, x=X, y=Y, data=DATA, key=KEY, **options):
    return fb.solve(problem, data, algorithm, x, y, iterations, key=key, **{"engine": SIMULATION, **options})


def without_seconds(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def same(one, other):
    """Whether two histories are equal, seconds apart and NaN equal to NaN."""
    np.testing.assert_equal(without_seconds(one), without_seconds(other))


@pytest.fixture(scope="module")
def long():
    return solve(30, metrics=METRICS)


# History --------------------------------------------------------------------------------------------------------------


def test_row_zero_is_the_start(long):
    row = long.history[0]
    assert [row[name] for name in ("iteration", *LEDGER, "seconds")] == [0] * 5
    assert row["size"] == pytest.approx(0.3**2 + 0.1**2) and row["gap"] == pytest.approx(0.3 - 0.5 + 0.4)
    assert np.isnan(row["hypergradient_norm"])
    assert list(row) == list(long.history[-1])


def test_every_iteration_has_its_row_and_ledgers_accumulate(long):
    history = long.history
    np.testing.assert_array_equal(history.column("iteration"), np.arange(31))
    steps = {name: np.diff(history.column(name)) for name in LEDGER}
    assert set(steps["rounds"]) == PER_ITERATION
    size = 2 * 8 * 2  # two clients, float64, two numbers; FedNest's own formula, once more with n = N'
    n = steps["rounds"] - 7
    np.testing.assert_array_equal(steps["bytes_down"], size * (2 * 5 + 2 + (n + 1) * 3 + 4))
    np.testing.assert_array_equal(steps["bytes_up"], size * (2 * 2 + 1 + n + 2))
    assert (np.diff(history.column("seconds")) >= 0).all() and history[-1]["seconds"] > 0
    assert all(type(row[name]) is int for row in history for name in LEDGER)  # no int32 that could overflow


def test_metrics_and_results_belong_to_their_iteration(long):
    for many in (1, 7):
        shorter = solve(many)
        row = long.history[many]
        assert row["size"] == float(jnp.sum(shorter.x**2)) and row["gap"] == float(abs(shorter.x[0] - shorter.y[0]))
        assert shorter.iteration == many and len(shorter.history) == many + 1
        same(shorter.history, [{k: v for k, v in r.items() if k not in METRICS} for r in long.history[: many + 1]])
    assert long.history[-1]["size"] == float(jnp.sum(long.x**2))


@pytest.mark.parametrize("metrics", [METRICS, None], ids=["metrics", "none"])
def test_evaluate_every_keeps_some_rows_and_the_last(long, metrics):
    some = solve(12, metrics=metrics, evaluate_every=5)
    rows = [long.history[k] for k in (0, 5, 10, 12)]
    same(some.history, rows if metrics else [{k: v for k, v in r.items() if k not in METRICS} for r in rows])


def test_the_history_is_a_data_frame(long):
    frame = long.history.to_dataframe()
    assert list(frame.columns[:5]) == ["iteration", *LEDGER, "seconds"]
    np.testing.assert_array_equal(frame["rounds"], long.history.column("rounds"))
    with pytest.raises(fb.InputError, match="no column 'accuracy'"):
        long.history.column("accuracy")


def test_long_runs_are_the_same_in_pieces():
    """300 iterations are more than one compiled chunk; with a metric every 7 they are many small ones."""
    one, many = solve(300, evaluate_every=300), solve(300, evaluate_every=7, metrics=METRICS)
    np.testing.assert_array_equal(flat((one.x, one.y)), flat((many.x, many.y)))
    assert [one.history[-1][name] for name in LEDGER] == [many.history[-1][name] for name in LEDGER]
    assert len(one.history) == 2 and len(many.history) == 1 + 300 // 7 + 1


# Budgets of rounds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [9, 10, 25, 40, 61, 100])
def test_a_budget_of_rounds_gives_the_whole_iterations_that_fit(long, budget):
    rounds = long.history.column("rounds")
    fitting = int(np.flatnonzero(rounds <= budget)[-1])
    assert fitting < 30
    result = solve(rounds=budget)
    assert result.iteration == fitting == result.history[-1]["iteration"]
    same(result.history, [{k: v for k, v in r.items() if k not in METRICS} for r in long.history[: fitting + 1]])


def test_a_budget_for_a_fixed_number_of_rounds():
    algorithm = dataclasses.replace(NEST, truncation="full")  # 2 * 2 + 3 + 3 = 10 rounds
    for budget, fitting in ((10, 1), (29, 2), (30, 3)):
        assert solve(rounds=budget, algorithm=algorithm).iteration == fitting
    with pytest.raises(fb.InputError, match=r"9 rounds are too few.*10"):
        solve(rounds=9, algorithm=algorithm)


# Modules as variables -------------------------------------------------------------------------------------------------


class Body(eqx.Module):
    """A layer with what is no float array: an activation, a string, an integer array."""

    layer: eqx.nn.Linear
    activation: object
    name: str
    steps: jax.Array

    def __call__(self, features):
        return self.activation(self.layer(features)) * self.steps[0].astype(features.dtype)


def test_equinox_modules_are_variables_and_come_back_as_modules():
    draw = np.random.default_rng(0)
    rows = [{"a": draw.normal(size=(4, 3)), "b": draw.normal(size=(4, 1))} for _ in range(3)]
    data = fb.FederatedData.stack(rows, rows)
    one, two = jax.random.split(KEY)
    body = Body(eqx.nn.Linear(3, 2, key=one), jnp.tanh, "body", jnp.asarray([2, 5]))
    head = eqx.nn.Linear(2, 1, key=two)

    def loss(ridge):
        def modules(x, y, e):
            return jnp.sum((y(x(e["a"])) - e["b"]) ** 2) + ridge * (jnp.sum(y.weight**2) + jnp.sum(y.bias**2))

        def arrays(x, y, e):
            hidden = jnp.tanh(x["weight"] @ e["a"] + x["bias"]) * 2
            return jnp.sum((y["weight"] @ hidden + y["bias"] - e["b"]) ** 2) + ridge * (
                jnp.sum(y["weight"] ** 2) + jnp.sum(y["bias"] ** 2)
            )

        return modules, arrays

    (g, g_arrays), (f, f_arrays) = loss(0.1), loss(0.0)
    plain = lambda layer: {"weight": layer.weight, "bias": layer.bias}
    algorithm = fb.LFedNest(**RATES, inner_rounds=1, local_steps=1)
    result = solve(3, algorithm, fb.Problem(g, f), body, head, data, metrics={"name": lambda x, y: len(x.name)})
    other = solve(3, algorithm, fb.Problem(g_arrays, f_arrays), plain(body.layer), plain(head), data)
    assert isinstance(result.x, Body) and isinstance(result.y, eqx.nn.Linear)
    assert result.x.activation is jnp.tanh and result.x.name == "body"
    np.testing.assert_array_equal(result.x.steps, [2, 5])
    for module, tree, start in ((result.x.layer, other.x, body.layer), (result.y, other.y, head)):
        np.testing.assert_allclose(module.weight, tree["weight"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(module.bias, tree["bias"], rtol=0, atol=1e-12)
        assert np.abs(module.weight - start.weight).max() > 1e-4


# Compiled once --------------------------------------------------------------------------------------------------------


def test_nothing_is_traced_again_between_iterations_and_runs():
    traces = []

    def counted(x, y, e):
        traces.append(1)
        return 1.25 * inner(x, y, e)  # what no other test has compiled

    problem = fb.Problem(counted, outer)

    def count(**changed):
        before = len(traces)
        solve(**{"iterations": 1, "problem": problem, **changed})
        return len(traces) - before

    first, abstract = count(), count()  # each run traces the losses once, to see what they compute now
    assert first > abstract
    assert count(iterations=300) == abstract
    assert count(key=jax.random.key(9), x=X + 1, y=Y - 1) == abstract
    slower = dataclasses.replace(NEST, inner_lr=0.01, hessian_lr=0.2, outer_lr=jnp.asarray(0.3))
    assert count(algorithm=slower) == abstract
    assert count(data=fb.FederatedData.stack([row + 1 for row in ROWS], ROWS)) == abstract
    assert count(metrics=METRICS, iterations=3) == abstract
    assert count(x=np.asarray(X)) == abstract
    another = dataclasses.replace(NEST, local_steps=3)
    assert count(algorithm=another) == abstract  # it asks the same oracles
    assert count(data=fb.FederatedData.stack([np.concatenate([row, row]) for row in ROWS], ROWS)) > abstract
