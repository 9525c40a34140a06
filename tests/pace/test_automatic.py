"""Steps that are found while an algorithm runs: what they are, what they cost, and the same on every engine."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.algorithms import ALGORITHMS
from fedbilevel.algorithms.components.inner_step import share_of_curvature
from fedbilevel.callbacks import Checkpoint
from fedbilevel.pace.automatic import STEPS, Auto, ready
from helpers.plain import RATES
from helpers.quadratic import flat, quadratic

KEY = jax.random.key(0)
AUTO = dict.fromkeys(STEPS, "auto")
Q = quadratic(clients=4, sizes=((3, 3), (5, 4)))
SMALL = {"inner_rounds": 2, "neumann_terms": 2, "local_steps": 2}
FAST = ("aggitd", "simfbo")
EACH = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ALGORITHMS]


def automatic(name, **settings):
    """An algorithm with "auto" wherever it may be."""
    fields = {field.name: field.metadata.get("words", ()) for field in dataclasses.fields(ALGORITHMS[name])}
    found = {step: "auto" for step in STEPS if "auto" in fields.get(step, ())}
    return ALGORITHMS[name](**{k: v for k, v in (found | SMALL | settings).items() if k in fields})


def solve(algorithm, iterations=8, q=Q, **more):
    return fb.solve(q.problem, q.data, algorithm, q.x, q.y, iterations, key=KEY, **more)


@pytest.mark.parametrize("name", EACH)
def test_every_algorithm_runs_alike_on_both_engines(name):
    """A cohort, minibatches and dropout."""
    algorithm = automatic(name, batch_size=2)
    ends = [solve(algorithm, 4, engine=engine(cohort=3, dropout=0.2)) for engine in (fb.Simulation, fb.Loopback)]
    assert fb.testing.distance(ends[0].state, ends[1].state) <= 1e-10
    for name in ("rounds", "bytes_down", "bytes_up"):
        np.testing.assert_array_equal(ends[0].history.column(name), ends[1].history.column(name))


def test_the_steps_are_those_of_the_clients_curvatures():
    largest = np.linalg.eigvalsh(Q.hessians(Q.t))[:, -1]
    row = solve(fb.Lockstep(local_steps=5, **AUTO), 1).history[-1]
    assert row["inner_lr"] == pytest.approx(share_of_curvature(5, 4, 4) / (1.2 * largest.max()))
    assert row["hessian_lr"] == pytest.approx(1.6 / (1.1 * largest.mean()))
    assert (row["outer_lr"], row["recovered"]) == (0, 0)  # x waits
    sampled = solve(fb.Lockstep(local_steps=5, **AUTO), 1, engine=fb.Simulation(cohort=2)).history[-1]
    assert sampled["inner_lr"] == pytest.approx(share_of_curvature(5, 4, 2) / (1.2 * largest.max()))
    assert sampled["hessian_lr"] == pytest.approx(1 / (1.2 * largest.max()))


def test_numbers_and_auto_mix():
    numbers = {"inner_lr": 0.02, "hessian_lr": 0.03, "outer_lr": 0.04}
    for name in STEPS:
        row = solve(fb.SimFBO(local_steps=2, **numbers | {name: "auto"}), 3).history[-1]
        kept = {step: row[step] for step in STEPS if step != name}
        assert kept == pytest.approx({step: value for step, value in numbers.items() if step != name})
        assert row[name] != numbers[name]
    assert "inner_lr" not in solve(fb.SimFBO(local_steps=2, **numbers), 1).history.columns


def test_numbers_alone_are_run_as_they_are():
    algorithm = fb.Lockstep(inner_lr=0.1, hessian_lr=0.1, outer_lr=0.1)
    assert type(ready(algorithm, Q.x)) is fb.Lockstep
    assert isinstance(ready(fb.Lockstep(outer_lr="auto"), Q.x), Auto)


def test_an_optimizer_of_x_has_a_step_of_its_own():
    algorithm = ready(fb.FedNest(outer_optimizer="adam:0.1", **AUTO), Q.x)
    assert isinstance(algorithm, Auto) and algorithm.found == ("inner_lr", "hessian_lr")


def test_no_scale_matters():
    """x in other units, y in others, and f and g together: the same path."""

    def ends(s):
        inner = lambda x, y, e: s * Q.problem.inner(*jax.tree.map(lambda leaf: leaf / s, (x, y)), e)
        outer = lambda x, y, e: s * Q.problem.outer(*jax.tree.map(lambda leaf: leaf / s, (x, y)), e)
        start = jax.tree.map(lambda leaf: s * leaf, (Q.x, Q.y))
        end = fb.solve(fb.Problem(inner, outer), Q.data, fb.Lockstep(**AUTO), *start, 60, key=KEY)
        return np.concatenate([flat(end.x), flat(end.y)]) / s

    one, moved = ends(1.0), np.concatenate([Q.t, Q.z])
    assert np.abs(one - moved).max() > 0.1
    for s in (1e-3, 1e3):
        np.testing.assert_allclose(ends(s), one, rtol=0, atol=1e-6 * np.abs(one).max())


@pytest.mark.parametrize("name", ["lockstep", "simfbo"])
def test_x_arrives_with_no_step_given(name):
    task = fb.tasks.TASKS["quadratic"](seed=3)
    end = fb.solve(
        task.problem, task.data, automatic(name, local_steps=1), task.x, task.y, 300, key=task.key, evaluate_every=300
    )
    slope = lambda x: np.linalg.norm(flat(fb.reference.hypergradient(task.problem, task.data, x, task.y)[0]))
    assert slope(end.x) < 0.02 * slope(task.x)


def test_what_is_measured_is_said_apart():
    algorithm = fb.Lockstep(**AUTO)
    known = fb.protocol(algorithm, Q.problem, Q.data, Q.x, Q.y)
    plain = fb.protocol(fb.Lockstep(**RATES), Q.problem, Q.data, Q.x, Q.y)
    assert (known.rounds, known.rounds_most, known.rounds_rarely) == (1, 1, 1)
    assert known.bytes_down - plain.bytes_down == 4 * 3 * 8 and known.bytes_up == plain.bytes_up
    assert [line.name for line in known.rarely] == ["meter.begin", "meter.curvature (same round)"]
    assert "and measuring, 1 round at the start: meter.begin" in str(known)
    assert "and measuring, now and then, no round: meter.curvature" in str(known)
    assert plain.rarely == () and "measuring" not in str(plain)
    cohort = fb.protocol(algorithm, Q.problem, Q.data, Q.x, Q.y, fb.Simulation(cohort=1))
    assert cohort.rounds_rarely == 4 and "4 rounds at the start" in str(cohort)


def test_rounds_and_bytes_are_those_of_the_protocol():
    known = fb.protocol(fb.Lockstep(**AUTO), Q.problem, Q.data, Q.x, Q.y)
    history = solve(fb.Lockstep(**AUTO), 12).history
    rounds, down = (np.diff(history.column(name)) for name in ("rounds", "bytes_down"))
    np.testing.assert_array_equal(rounds, [2, *[1] * 11])
    first, beside = (line.bytes_down_most for line in known.rarely)
    more = [first if k == 0 else beside if k in (1, 2, 4, 8, 10) else 0 for k in range(12)]
    np.testing.assert_array_equal(down, known.bytes_down + np.array(more))


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_a_small_budget_measures_less(budget):
    end = fb.solve(Q.problem, Q.data, fb.Lockstep(**AUTO), Q.x, Q.y, rounds=budget, key=KEY)
    assert end.history[-1]["rounds"] == budget and end.iteration == max(1, budget - 1)
    largest = np.linalg.eigvalsh(Q.hessians(Q.t))[:, -1]
    known = share_of_curvature(5, 4, 4) / (1.2 * largest.max())
    assert end.history[1]["inner_lr"] == pytest.approx(known if budget > 1 else STEPS["inner_lr"])


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole = solve(fb.Lockstep(**AUTO), 14)
    solve(fb.Lockstep(**AUTO), 7, callbacks=[Checkpoint(tmp_path, every=7)])
    rest = solve(fb.Lockstep(**AUTO), 14, resume=tmp_path)
    assert fb.testing.distance(whole.state, rest.state) == 0
    assert whole.history.column("outer_lr")[-1] == rest.history.column("outer_lr")[-1] > 0


def test_an_estimator_measures_once():
    bound = fb.estimator(Q.problem, Q.data, fb.AggITD(inner_rounds=2, truncation="full", **AUTO), Q.x, Q.y)
    largest = np.linalg.eigvalsh(Q.hessians(Q.t))[:, -1]
    assert bound.algorithm.hessian_lr == pytest.approx(1 / (1.2 * largest.mean()))
    assert bound.protocol.rarely == () and bound.protocol.rounds == 2 * 2 + 2
    h, _ = bound(Q.x, Q.y, KEY)
    other, _ = fb.estimate_hypergradient(Q.problem, Q.data, bound.algorithm, Q.x, Q.y, key=KEY)
    np.testing.assert_array_equal(flat(h), flat(other))


def test_it_runs_in_32_bits_with_numbers_of_several_kinds():
    """x in half the precision of y."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        x, y = jnp.zeros(2, jnp.bfloat16), jnp.zeros(3, jnp.float32)
        inner = lambda x, y, e: 0.5 * jnp.sum((y - e) ** 2) * jnp.exp(jnp.mean(x))
        outer = lambda x, y, e: jnp.sum((y - e - 1) ** 2) + jnp.sum(x**2)
        rows = [np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)]
        data = fb.FederatedData.stack(rows, rows)
        end = fb.solve(fb.Problem(inner, outer), data, fb.Lockstep(**AUTO), x, y, 6, key=KEY, check=False)
    assert (end.x.dtype, end.y.dtype) == (jnp.bfloat16, jnp.float32)
    assert np.isfinite(np.asarray(end.x, np.float32)).all()


def test_auto_is_refused_where_it_cannot_be():
    with pytest.raises(fb.InputError, match=r"FedBiOAcc\(outer_lr=...\) is a step size, a positive number; got 'auto'"):
        fb.FedBiOAcc(outer_lr="auto")


def test_a_loss_that_no_step_helps_ends_with_a_sentence():
    """It has no value where y* is."""
    inner = lambda x, y, e: 0.5 * jnp.sum((y - 3) ** 2) + jnp.sum(jnp.where(y > 2, jnp.nan * y, x * e * y))
    problem = fb.Problem(inner, lambda x, y, e: jnp.sum(y**2) + x**2 * e)
    data = fb.FederatedData.stack([np.ones(1)] * 2, [np.ones(1)] * 2)
    with pytest.raises(fb.Diverged, match="automatic inner_lr, hessian_lr and outer_lr had been halved 10 times"):
        fb.solve(problem, data, fb.Lockstep(**AUTO), 0.1, jnp.ones(2), 20_000, key=KEY, check=False)


@pytest.mark.parametrize("key", range(3))
def test_a_series_cut_at_random_does_not_throw_x_away(key):
    """At y = 0 most draws make next to no hypergradient; a penalty of e^-1000 leads nowhere."""
    problem = fb.Problem(
        lambda x, y, number: 0.5 * (y - number) ** 2 + 0.5 * jnp.exp(x) * y**2,
        lambda x, y, number: 0.5 * (y - number) ** 2,
    )
    data = fb.FederatedData.stack(
        [jnp.asarray([1.0, 2.5]), jnp.asarray([1.5])], [jnp.asarray([0.8]), jnp.asarray([1.4])]
    )
    best = np.log(1.625 / 1.1 - 1)
    algorithm = fb.AggITD(inner_rounds=10)
    end = fb.solve(problem, data, algorithm, 0.0, 0.0, 150, key=jax.random.key(key), check=False)
    assert best - 1 < end.x < 0


def test_mixing_tells_of_its_steps_too():
    """With `anderson` x has a way of its own, and its step is a number."""
    row = solve(fb.Lockstep(anderson=3), 2).history[-1]
    assert row["outer_lr"] == STEPS["outer_lr"] and row["inner_lr"] > 0 and row["hessian_lr"] > 0
    assert row["mixed"] in (0, 1) and row["recovered"] == 0
