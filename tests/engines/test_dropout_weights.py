"""Clients of unequal weights that drop out: control variates stay means over all clients, so that nothing is off.

Float64, everyone asked, all rows: at the solution every client's correction is zero, whoever answers.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax.tree
import pytest

import fedbilevel as fb
from fedbilevel.callbacks import Checkpoint
from fedbilevel.cohorts import full_weights, mean_reply, stays
from helpers.quadratic import flat, inner, outer, quadratic

KEY = jax.random.key(3)
WEIGHTS = (1.0, 2.0, 0.5, 3.0, 1.0, 2.0)
P = np.array(WEIGHTS) / sum(WEIGHTS)
DROPOUT = 0.4
ENGINES = [fb.Simulation, fb.Loopback]
HELD = 1e-14  # a step of x so small that x stays
LOWER = {"inner_rounds": 2, "local_steps": 3, "inner_lr": 0.05, "outer_lr": HELD}
FULL = {**LOWER, "one_round": True, "truncation": "full", "hessian_lr": 0.05}
CONTROLLED = {
    "lockstep": fb.Lockstep(local_steps=2, outer_steps=2, inner_lr=0.05, hessian_lr=0.05, outer_lr=0.02),
    "one-round": fb.AggITD(**FULL),
    "one-round, apart": fb.AggITD(**FULL, independent_cohorts=True),
    "fedf2sa": fb.FedF2SA(**LOWER, penalty=20.0),
}


BOWL = 3.0  # makes Phi convex, whatever the weights
PROBLEM = fb.Problem(inner, lambda x, y, e: outer(x, y, e) + BOWL / 2 * optax.tree.norm(x, squared=True))


def problem(weights=WEIGHTS):
    q = quadratic(seed=1, clients=6, sizes=((4, 4),))
    return dataclasses.replace(q, problem=PROBLEM, data=fb.FederatedData.stack(q.inner, q.outer, weights))


def weighted(per_client):
    return np.tensordot(P, per_client, 1)


def lower_solution(q, t):
    """y*(x) of the weighted problem."""
    return np.linalg.solve(weighted(q.hessians(t)), weighted(q.targets(t)))


def hypergradient(q, t):
    y = lower_solution(q, t)
    v = np.linalg.solve(weighted(q.hessians(t)), weighted(q.outer_y(t, y)))
    return weighted(q.outer_x(t, y)) + BOWL * t - weighted(q.crosses(t, y)) @ v


def solve(name, iterations, engine, q=None, **settings):
    q = q or problem()
    last = {"evaluate_every": iterations, **settings}
    return fb.solve(q.problem, q.data, CONTROLLED[name], q.x, q.y, iterations, key=KEY, engine=engine, **last)


# The solution ---------------------------------------------------------------------------------------------------------


def test_lockstep_ends_where_the_weighted_hypergradient_is_zero():
    q = problem()
    end = solve("lockstep", 6_000, fb.Simulation(dropout=DROPOUT))
    size = lambda t: np.linalg.norm(hypergradient(q, t))
    assert size(flat(end.x)) < 1e-10 * size(q.t)
    plain = solve("lockstep", 6_000, fb.Simulation(dropout=DROPOUT), problem(None))  # where clients count alike
    assert np.linalg.norm(flat(plain.x) - flat(end.x)) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one-round", "one-round, apart", "fedf2sa"])
def test_the_lower_level_ends_at_the_weighted_solution(name):
    q = problem()
    end = solve(name, 1_000, fb.Simulation(dropout=DROPOUT))
    best = lower_solution(q, flat(end.x))
    assert np.linalg.norm(flat(end.y) - best) < 1e-10 * np.linalg.norm(q.z - best)
    assert np.linalg.norm(q.solution(flat(end.x)) - best) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTROLLED)
def test_both_engines_agree_after_thirty_iterations(name):
    runs = [flat(solve(name, 30, engine(dropout=DROPOUT)).state) for engine in (fb.Simulation, fb.Loopback)]
    assert np.linalg.norm(runs[0] - runs[1]) <= 1e-12 * np.linalg.norm(runs[0])


@pytest.mark.slow
def test_in_32_bits_they_agree_as_far_as_32_bits_go():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        q = problem()
        single = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)
        q = dataclasses.replace(q, x=single(q.x), y=single(q.y))
        runs = [flat(solve("lockstep", 30, engine(dropout=DROPOUT), q).state) for engine in ENGINES]
    assert runs[0].dtype == np.float32
    assert np.linalg.norm(runs[0] - runs[1]) <= 1e-5 * np.linalg.norm(runs[0])


def test_after_a_resume_too(tmp_path):
    engine = lambda: fb.Simulation(dropout=DROPOUT)
    solve("lockstep", 7, engine(), callbacks=[Checkpoint(tmp_path)], evaluate_every=1)
    resumed = solve("lockstep", 20, engine(), resume=tmp_path, evaluate_every=1)
    np.testing.assert_array_equal(flat(resumed.state), flat(solve("lockstep", 20, engine()).state))


# The share ------------------------------------------------------------------------------------------------------------


NUMBERS = np.sqrt([2.0, 3.0, 5.0, 7.0, 11.0, 13.0])  # no two sets of clients have the same mean


class Counting(fb.Algorithm):
    """What share answered, and the mean of the clients' numbers."""

    def step(self, fed, state):
        mean = fed.average(self.number, state.x)
        return state, {"mean": mean, "share": jnp.asarray(fed.share, jnp.result_type(float))}

    def number(self, client, x):
        return jnp.asarray(NUMBERS)[client.index]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("weights", "cohort"), [(None, None), (None, 4), (WEIGHTS, None)])
def test_the_share_is_the_weight_of_those_who_answered(engine, weights, cohort):
    q = problem(weights)
    history = fb.solve(q.problem, q.data, Counting(), q.x, q.y, 20, key=KEY, engine=engine(cohort, dropout=0.5)).history
    p = np.full(6, 1 / 6) if weights is None else P
    sets = [np.array(s) for s in itertools.product([0.0, 1.0], repeat=6) if any(s)]
    means = {(p * s) @ NUMBERS / (p @ s): p @ s for s in sets}  # a mean tells who answered
    seen = set()
    for row in history[1:]:
        mean = min(means, key=lambda each: abs(each - row["mean"]))
        assert mean == pytest.approx(row["mean"], rel=1e-12)
        assert row["share"] == pytest.approx(means[mean], rel=1e-15)  # in 32 bits it would be off by 1e-8
        seen.add(mean)
    assert len(seen) > 5


@pytest.mark.parametrize("engine", ENGINES)
def test_of_a_cohort_drawn_by_weight_there_is_no_share(engine):
    q = problem()
    with pytest.raises(fb.InputError, match=r"fed\.share is not known for a cohort"):
        fb.solve(q.problem, q.data, Counting(), q.x, q.y, 1, key=KEY, engine=engine(3))


# The bias of a mean over those who answered ---------------------------------------------------------------------------


def expected_weights(p, dropout):
    """(m,) what each client weighs on average in a mean over those who answer; one always does."""
    total = np.zeros(len(p))
    for answers in itertools.product([0.0, 1.0], repeat=len(p)):
        s = np.array(answers)
        chance = np.prod(np.where(s, 1 - dropout, dropout))
        total += chance * (p * s / (p @ s) if s.any() else np.full(len(p), 1 / len(p)))
    return total


def test_the_documented_bias_is_what_the_engine_does():
    """The example of docs/how-it-works.md: of two clients, the one that counts 0.9 weighs 0.70."""
    assert expected_weights(np.array([0.9, 0.1]), 0.3)[0] == pytest.approx(0.696, rel=1e-12)
    np.testing.assert_allclose(expected_weights(np.full(4, 0.25), 0.3), 0.25)  # none where clients count alike
    expected = expected_weights(P, DROPOUT)
    keys = jax.random.split(KEY, 20_000)
    weights = full_weights(jnp.asarray(P), jnp.arange(6), 6)

    def one(key):
        present = stays(key, jnp.arange(6), DROPOUT)
        share = jnp.where(present, weights, 0.0)
        return mean_reply(jnp.eye(6), share / share.sum())

    seen = np.asarray(jax.jit(jax.vmap(one))(keys)).mean(0)
    np.testing.assert_allclose(seen, expected, atol=0.01)
    assert P[3] - expected[3] > 0.02 and expected[2] - P[2] > 0.01
