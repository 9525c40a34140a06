"""AggITD's options that are ours: warm start of v, one round a turn, independent cohorts; closed forms and costs."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax.tree
import pytest
from jax.flatten_util import ravel_pytree

import fedbilevel as fb
from fedbilevel.algorithms.aggitd_ours import OneRound
from helpers import cases
from helpers.draws import STEPS, N, exact, fresh_clients
from helpers.logistic import CLIENTS, PROBLEM, X, Y
from helpers.plain import plain
from helpers.quadratic import DY, flat, power, quadratic
from helpers.small_task import COHORT, COLUMNS, DX, task
from helpers.small_task import DY as SENT_Y

KEY = jax.random.key(0)
Q0 = quadratic()
T = Q0.t


class Staying(fb.AggITD):
    """x stays where it is; the estimates are columns of the history."""

    def step(self, fed, state):
        h, _, _, after, _ = self.estimate_parts(fed, state)
        return dataclasses.replace(after, x=state.x), {f"h{i}": each for i, each in enumerate(ravel_pytree(h)[0])}


def estimates(history, size):
    return np.stack([history.column(f"h{i}") for i in range(size)], axis=1)[1:]


# The warm start of v --------------------------------------------------------------------------------------------------


def test_a_warm_start_of_v_ends_at_the_hypergradient_where_a_cold_one_stays_biased():
    lam, turns, iterations = 0.2, 1, 400
    best, H = Q0.solution(T), Q0.hessians(T).mean(0)
    start = ravel_pytree(Q0.y)[1](best)  # y stays at y*: what is left is the series
    M, v_star = np.eye(DY) - lam * H, np.linalg.solve(H, Q0.outer_y(T, best).mean(0))

    def run(**options):
        steps = {"inner_rounds": turns, "inner_lr": 0.05, "local_steps": 2, "hessian_lr": lam}
        algorithm = plain(Staying, truncation="full", **steps, **options)
        return estimates(fb.solve(Q0.problem, Q0.data, algorithm, Q0.x, start, iterations, key=KEY).history, T.size)

    cold, warm = run(), run(warm_start_v=True)
    expected = lambda k: Q0.compose(T, best, v_star - power(M, (turns + 1) * k) @ v_star)
    np.testing.assert_allclose(cold, np.tile(expected(1), (iterations, 1)), rtol=0, atol=1e-11)
    for k in (1, 2, 3, 10, iterations):
        np.testing.assert_allclose(warm[k - 1], expected(k), rtol=0, atol=1e-11)
    np.testing.assert_allclose(warm[-1], Q0.hypergradient(T), rtol=0, atol=1e-10)
    assert np.abs(cold[-1] - Q0.hypergradient(T)).max() > 0.1


def test_a_warm_start_does_not_claim_that_factors_stretch():
    algorithm = plain(fb.AggITD, truncation="full", warm_start_v=True, outer_lr=1e-9)
    history = fb.solve(Q0.problem, Q0.data, algorithm, Q0.x, Q0.y, 200, key=KEY).history
    assert np.isnan(history.column("vector_growth")[1:]).all()


@pytest.mark.parametrize("truncation", ["uniform", 2])
def test_a_warm_start_without_the_full_sum_is_refused(truncation):
    with pytest.raises(fb.InputError, match="truncation='full'"):
        fb.AggITD(warm_start_v=True, truncation=truncation)


# One round a turn -----------------------------------------------------------------------------------------------------


class Forgetting(OneRound):
    """Wrong on purpose: c is the mean of the control variates of those who were asked."""

    def turn(self, fed, x, y, control, r, wanted, lam, cohort):
        moved, own, new = fed.average(self.own, x, y, control, r, lam, replies=(True, True, wanted))
        return optax.tree.add(y, moved), own, new

    def own(self, client, x, y, c, r, lam):
        out = self.corrected_anchor(client, x, y, c, r, lam)
        return fb.Reply((out.reply[0], out.state, out.reply[2]), out.state)


class Stalling(Staying):
    """With the wrong turns."""

    @fb.algorithm.component
    def turns(self):
        return Forgetting(self.terms, self.inner_lr, self.local_steps)


@pytest.mark.parametrize(
    ("kind", "cohort", "taus"), [(Staying, None, (1, 5)), (Staying, 3, (1, 5)), (Stalling, 3, (5,))]
)
def test_one_round_a_turn_leads_to_the_solution_with_cohorts_too(kind, cohort, taus):
    q = quadratic(seed=2, clients=8)
    curvature = np.linalg.eigvalsh(q.hessians(q.t)).max()
    for tau in taus:
        algorithm = plain(
            kind, inner_rounds=500, inner_lr=0.4 / (tau * curvature), local_steps=tau, one_round=True, truncation="full"
        )
        options = {"key": KEY, "engine": fb.Simulation(cohort), "evaluate_every": 12}
        result = fb.solve(q.problem, q.data, algorithm, q.x, q.y, 12, **options)
        off = np.linalg.norm(flat(result.y) - q.solution(q.t)) / np.linalg.norm(q.solution(q.t))
        assert off > 1e-3 if kind is Stalling else off < 1e-10


def test_without_control_variates_a_cohort_leaves_a_floor():
    q = quadratic(seed=2, clients=8)
    algorithm = plain(Staying, inner_rounds=500, inner_lr=0.05, local_steps=1, truncation="full")
    options = {"key": KEY, "engine": fb.Simulation(3), "evaluate_every": 4}
    y = fb.solve(q.problem, q.data, algorithm, q.x, q.y, 4, **options).y
    assert np.linalg.norm(flat(y) - q.solution(q.t)) > 1e-3


def test_weighted_clients_need_all_of_them():
    data = fb.FederatedData.stack(Q0.inner, Q0.outer, weights=[1, 2, 3, 4, 5])
    run = lambda cohort: fb.solve(
        Q0.problem, data, plain(fb.AggITD, one_round=True), Q0.x, Q0.y, 1, key=KEY, engine=fb.Simulation(cohort)
    )
    assert np.isfinite(flat(run(None).x)).all()
    with pytest.raises(fb.InputError, match="leave cohort= out"):
        run(3)


# Independent cohorts --------------------------------------------------------------------------------------------------


@fb.federation.Federation.register
class Scripted:
    """`fed`, but exchange j asks the client that is digit j of a number in base 3; a turn has `each` exchanges."""

    def __init__(self, fed, number, each):
        self._fed, self._number, self._each, self._place = fed, number, each, 0

    def average(self, *args, cohort=None, **kwargs):
        digit = (self._number // jnp.asarray(3, jnp.int32) ** jnp.asarray(self._place, jnp.int32)) % 3
        self._place = self._place + 1
        return self._fed.average(*args, **kwargs, cohort=digit[None])

    def repeat(self, times, body, carry):
        def turn(t, carry):
            self._place = self._each * t
            return body(t, carry)

        out = self._fed.repeat(times, turn, carry)
        self._place = self._each * times
        return out

    def __getattr__(self, name):
        return getattr(self._fed, name)


class Counting(fb.State):
    """x, y, and which choice of clients comes next."""

    number: Any


class Exhaustive(fb.AggITD):
    """One estimate at the same place for each choice of clients."""

    def init(self, x, y):
        return Counting(x, y, jnp.zeros((), jnp.int32))

    def step(self, fed, state):
        scripted = Scripted(fed, state.number, 3 if self.independent_cohorts else 2)
        h = self.estimate_parts(scripted, super().init(state.x, state.y))[0]
        return Counting(state.x, state.y, state.number + 1), {f"h{i}": each for i, each in enumerate(h)}


@pytest.mark.parametrize("independent", [False, True])
def test_independent_cohorts_remove_the_bias(independent):
    """Over all choices of one client of three for every exchange, and all Q, on a g that is not quadratic."""
    exchanges = (3 if independent else 2) * N + 2
    means = []
    for Q in range(N + 1):
        algorithm = plain(Exhaustive, inner_rounds=N, truncation=Q, independent_cohorts=independent, **STEPS)
        run = fb.solve(PROBLEM, CLIENTS.data, algorithm, X, Y, 3**exchanges, key=KEY, engine=fb.Simulation(cohort=1))
        means.append(estimates(run.history, 2).mean(0))
    mean, unbiased, shared = np.mean(means, axis=0), exact(CLIENTS, "aggitd"), fresh_clients("aggitd")
    assert np.abs(unbiased - shared).max() > 1e-3 * np.abs(unbiased).max()
    np.testing.assert_allclose(mean, unbiased if independent else shared, rtol=0, atol=1e-12)


# Rounds and floats ----------------------------------------------------------------------------------------------------

OPTIONS = ("warm_start_v", "one_round", "independent_cohorts")
CHOICES = [dict(zip(OPTIONS, each, strict=True)) for each in itertools.product((False, True), repeat=3)]
named = lambda options: "+".join(name for name, on in options.items() if on) or "none"


def formula(turns, Q, warm_start_v, one_round, independent_cohorts):
    """(rounds, floats down, floats up) of one iteration for one client, as in the module's docstring."""
    dx, dy, N = DX, SENT_Y, turns
    down = (N + 4) * dx + (3 * N - Q + 5) * dy if one_round else (2 * N + 4) * dx + (4 * N - Q + 5) * dy
    down += warm_start_v * dy + independent_cohorts * (N - Q) * (dx + dy)
    return np.array([(1 if one_round else 2) * N + 3, down, 2 * N * dy + (N - Q + 1) * dy + 2 * dx])


def counted(turns, Q, options):
    return formula(turns, Q, **options) * np.array([1, 8 * COHORT, 8 * COHORT])


@pytest.mark.parametrize("options", CHOICES, ids=named)
def test_the_protocol_is_the_formula(options):
    for turns, cut in itertools.product((1, 4), ("full",) if options["warm_start_v"] else ("full", "uniform")):
        algorithm = plain(fb.AggITD, inner_rounds=turns, truncation=cut, **options)
        protocol = fb.protocol(algorithm, *task(), engine=fb.Simulation(cohort=COHORT))
        each = np.array([counted(turns, Q, options) for Q in ([0] if cut == "full" else range(turns + 1))])
        assert protocol.kind == "exact"
        np.testing.assert_allclose([getattr(protocol, name) for name in COLUMNS], each.mean(0), rtol=1e-12)
        assert [getattr(protocol, f"{name}_most") for name in COLUMNS] == each.max(0).tolist()
        assert ("(same round)" in str(protocol)) == options["independent_cohorts"]


@pytest.mark.parametrize("options", [CHOICES[3], CHOICES[7]], ids=named)
def test_what_is_counted_is_the_formula(options):
    problem, data, x, y = task()
    turns, Q = 2, 0 if options["warm_start_v"] else 1
    algorithm = plain(fb.AggITD, inner_rounds=turns, truncation="full" if options["warm_start_v"] else Q, **options)
    for engine in (fb.Simulation(cohort=COHORT), fb.Loopback(cohort=COHORT)):
        row = fb.solve(problem, data, algorithm, x, y, 1, key=KEY, engine=engine).history[-1]
        np.testing.assert_array_equal([row[name] for name in COLUMNS], counted(turns, Q, options))


class Alone(fb.Algorithm):
    """Asks in the round of an exchange that is not there, or is elsewhere."""

    where: str = fb.option("first")

    def step(self, fed, state):
        ask = lambda **more: fed.average(self.value, state.y, **more)
        if self.where == "after a draw":
            fed.randint(0, 2)
        if self.where == "after a loop":
            fed.repeat(2, lambda t, c: c + ask(), jnp.zeros(()))
        if self.where == "in a loop":
            ask()
            return state, {"a": fed.repeat(2, lambda t, c: c + ask(beside=True), jnp.zeros(()))}
        if self.where == "well":
            ask()
            fed.draw_cohort()
        return state, {"a": ask(beside=True)}

    def value(self, client, y):
        return client.problem.inner_value(jnp.zeros(DX), y, client.inner)


@pytest.mark.parametrize("where", ["first", "after a draw", "after a loop", "in a loop", "well"])
def test_an_exchange_beside_another_needs_one_in_the_same_place(where):
    trace = lambda: fb.protocol(Alone(where), *task()).rounds
    if where == "well":
        assert trace() == 1
    else:
        with pytest.raises(fb.InputError, match="needs an exchange before it"):
            trace()


# Engines --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [CHOICES[3], CHOICES[4], CHOICES[6]], ids=named)
def test_both_engines_agree(options):
    q = cases.problem()
    cut: Any = "full" if options["warm_start_v"] else "uniform"
    algorithm = plain(fb.AggITD, inner_rounds=2, local_steps=2, batch_size=2, truncation=cut, **options)
    engines = fb.Simulation(cohort=4), fb.Loopback(cohort=4, shuffle=3)
    one, other = (fb.solve(q.problem, q.data, algorithm, q.x, q.y, 3, key=KEY, engine=engine) for engine in engines)
    np.testing.assert_allclose(flat(one.state), flat(other.state), rtol=1e-12, atol=1e-12)
    for name in COLUMNS:
        assert list(one.history.column(name)) == list(other.history.column(name))


@pytest.mark.slow
def test_the_conformance_suite_passes_all_of_them_together():
    busy = plain(fb.AggITD, inner_rounds=2, local_steps=2, batch_size=2, truncation="full", **CHOICES[-1])
    accurate = fb.AggITD(
        inner_rounds=600, local_steps=1, inner_lr=0.15, hessian_lr=0.15, truncation="full", **CHOICES[-1]
    )
    assert fb.testing.check_algorithm(busy, accurate).passed
