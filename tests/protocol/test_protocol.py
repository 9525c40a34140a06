"""Rounds and bytes: what is printed, what a simulation counts and what Loopback sends equal the formulas of algorithms.md.

The formulas are written here once more, in floats per client, as functions of Q (AggITD) or of N' (the FedNest family).
"""

from __future__ import annotations

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax.tree
import pytest

import fedbilevel as fb
from helpers.plain import plain
from helpers.small_task import CLIENTS, COHORT, COLUMNS, DX, DY, ledger, task


def formula(algorithm, K=None):
    """(rounds, floats down, floats up) of one iteration, for one client; K is Q or N'."""
    kind, T = type(algorithm).__name__, algorithm.inner_rounds
    idle_lower = T * (algorithm.skip_idle_rounds and algorithm.local_steps == 1)
    idle_upper = int(algorithm.skip_idle_rounds and algorithm.outer_steps == 1)
    if kind == "AggITD":
        N, Q = T, 0 if K is None else K
        total = np.array([2 * N + 3, (2 * N + 4) * DX + (4 * N - Q + 5) * DY, 2 * N * DY + (N - Q + 1) * DY + 2 * DX])
    else:
        lower = {
            "FedNest": (2, 2 * DX + 3 * DY, 2 * DY), "FedNestSGD": (1, DX + DY, DY),
            "LFedNest": (1, DX + DY, DY), "LFedNestSVRG": (2, 2 * DX + 3 * DY, 2 * DY),
        }[kind]  # fmt: skip
        if kind.startswith("LFed"):
            upper, idle_upper = (1, DX + DY, DX), 0
        else:
            K = algorithm.neumann_terms if K is None else K
            upper = (K + 3, DX + DY + (K + 1) * (DX + 2 * DY) + 2 * DX + 2 * DY, (1 + K) * DY + 2 * DX)
        idle_lower = 0 if lower[0] == 1 else idle_lower
        total = T * np.array(lower) + np.array(upper)
    skipped = idle_lower * np.array([1, DX + 2 * DY, DY]) + idle_upper * np.array([1, 2 * DX + 2 * DY, DX])
    return total - skipped


def counted(algorithm, K=None, itemsize=8, cohort=COHORT):
    """The formula's (rounds, bytes down, bytes up), over the cohort."""
    return formula(algorithm, K) * np.array([1, itemsize * cohort, itemsize * cohort])


def possible(algorithm):
    """The numbers that an iteration may draw; None if it draws none that changes its messages."""
    if type(algorithm).__name__.startswith("LFed") or algorithm.truncation.full:
        return [None]
    return range(algorithm.inner_rounds + 1) if isinstance(algorithm, fb.AggITD) else range(algorithm.neumann_terms)


SETTINGS = [
    {"inner_rounds": 5},
    {"inner_rounds": 4, "truncation": "full", "batch_size": 2},
    {"inner_rounds": 1, "local_steps": 1, "skip_idle_rounds": True},
    {"inner_rounds": 3, "local_steps": 1, "outer_steps": 2, "skip_idle_rounds": True},
    {"inner_rounds": 3, "local_steps": 2, "outer_steps": 1, "skip_idle_rounds": True, "batch_size": 1},
]
KINDS = [fb.AggITD, fb.FedNest, fb.FedNestSGD, fb.LFedNest, fb.LFedNestSVRG]  # the others: test_family_messages.py


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_protocol_is_the_formula_expected_and_at_most(kind, dtype):
    for settings in SETTINGS[:: 1 if dtype == np.float64 else 3]:
        series = {} if kind is fb.AggITD else {"neumann_terms": settings["inner_rounds"] + 1}
        algorithm = plain(kind, **settings, **series)
        protocol = fb.protocol(algorithm, *task(dtype), engine=fb.Simulation(cohort=COHORT))
        each = np.array([counted(algorithm, K, np.dtype(dtype).itemsize) for K in possible(algorithm)])
        assert protocol.kind == "exact"
        np.testing.assert_allclose([getattr(protocol, name) for name in COLUMNS], each.mean(0), rtol=1e-12)
        assert [getattr(protocol, f"{name}_most") for name in COLUMNS] == each.max(0).tolist()
        assert protocol.rounds == pytest.approx(sum(exchange.times for exchange in protocol.exchanges))


def test_the_published_counts():
    count = lambda algorithm: fb.protocol(algorithm, *task()).rounds
    assert count(plain(fb.AggITD, inner_rounds=5)) == 13 == 2 * 5 + 3
    T, N = 4, 6
    nest = {"inner_rounds": T, "neumann_terms": N}
    assert count(plain(fb.FedNest, **nest)) == 2 * T + (N + 5) / 2
    assert count(plain(fb.FedNest, **nest, truncation="full")) == 2 * T + N + 3
    assert count(plain(fb.FedNestSGD, **nest, truncation="full")) == T + N + 3
    assert count(plain(fb.LFedNest, **nest)) == T + 1
    assert count(plain(fb.LFedNestSVRG, **nest)) == 2 * T + 1


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, np.float64) for kind in KINDS), (fb.LFedNest, np.float32)])
def test_what_is_counted_is_the_formula_for_every_number_drawn(kind, dtype):
    settings = {"inner_rounds": 2, "batch_size": None if dtype == np.float64 else 2}
    settings |= {} if kind is fb.AggITD else {"neumann_terms": 3}
    itemsize = np.dtype(dtype).itemsize
    for K in possible(plain(kind, **settings)):
        algorithm = plain(kind, **settings, **({} if K is None else {"truncation": K}))
        expected = counted(algorithm, K, itemsize)
        for engine in (fb.Simulation(cohort=COHORT), fb.Loopback(cohort=COHORT)):
            np.testing.assert_array_equal(ledger(algorithm, engine, 1, dtype)[0], expected)
    wrong = counted(algorithm, K, itemsize, cohort=COHORT + 1)
    assert (wrong != expected).any()


@pytest.mark.parametrize("kind", [fb.AggITD, fb.FedNest])
def test_the_drawn_numbers_are_uniform_and_change_from_iteration_to_iteration(kind):
    algorithm = plain(kind, inner_rounds=2, **({"neumann_terms": 3} if kind is fb.FedNest else {}))
    costs = ledger(algorithm, fb.Simulation(cohort=COHORT), 900)
    rows, times = np.unique(costs, axis=0, return_counts=True)
    each = np.unique([counted(algorithm, K) for K in possible(algorithm)], axis=0)
    np.testing.assert_array_equal(rows, each)
    expected = 900 / len(each)
    assert np.sum((times - expected) ** 2 / expected) < 2 + 5 * 2  # chi-square with two degrees of freedom
    assert len({tuple(pair) for pair in np.stack([costs[:-1, 2], costs[1:, 2]], 1)}) == 9  # any after any


# Algorithms of a user's own -------------------------------------------------------------------------------------------


class Own(fb.Algorithm):
    """Averages gradients under some control flow, which a subclass writes."""

    lr: Any = fb.rate(0.1)

    def gradient(self, client, x, y, more):
        g = client.problem.inner_gradient(x, y, client.inner)
        return g, g

    def move(self, fed, x, y, down=True, up=True):
        g, _ = fed.average(self.gradient, x, y, fed.when(down, x), replies=(True, up))
        return optax.tree.add_scale(y, -self.lr, g)


class Drawing(Own):
    """A number of rounds drawn in {1, 2, 3}, then twice one or none; the extra part down from the second on."""

    def step(self, fed, state):
        x, y = state.x, state.y
        y = fed.repeat(fed.randint(1, 4), lambda t, y: self.move(fed, x, y, down=t > 0), y, most=3)
        inner = lambda t, y: fed.repeat(fed.randint(0, 2), lambda _, y: self.move(fed, x, y, up=False), y, most=1)
        return fb.State(x, fed.repeat(2, inner, y)), {}


class Plain(Own):
    def step(self, fed, state):
        once = fed.randint(0, 2)
        y = fed.repeat(3, lambda t, y: self.move(fed, state.x, y, down=t >= once, up=t == 2), state.y)
        return fb.State(state.x, y), {}


class Until(Own):
    def step(self, fed, state):
        small = lambda y: optax.tree.norm(y) > 1.0
        return fb.State(state.x, fed.until(small, lambda t, y: self.move(fed, state.x, y), state.y, most=7)), {}


class Flagged(Own):
    def step(self, fed, state):
        return fb.State(state.x, self.move(fed, state.x, state.y, down=optax.tree.norm(state.y) > 1.0)), {}


class Counted(Own):
    """A number of rounds that depends on y, out of `most`, in a window that only y itself tells."""

    def step(self, fed, state):
        many = (optax.tree.norm(state.y) > 0.3) & (optax.tree.norm(state.y) < 0.7)
        times = jnp.where(many, 5, 1)
        return fb.State(state.x, fed.repeat(times, lambda t, y: self.move(fed, state.x, y), state.y, most=5)), {}


def of(kind):
    return fb.protocol(kind(), *task(), engine=fb.Simulation(cohort=COHORT))


def test_an_own_algorithms_protocol_is_exact():
    protocol = of(Plain)
    down, more, up = 8 * COHORT * (DX + DY), 8 * COHORT * DX, 8 * COHORT * DY
    assert (protocol.kind, protocol.rounds) == ("exact", 3)
    assert (protocol.bytes_down, protocol.bytes_down_most) == (3 * down + 2.5 * more, 3 * down + 3 * more)
    assert (protocol.bytes_up, protocol.bytes_up_most) == (3 * up + up, 4 * up)


def test_draws_within_loops_are_sampled():
    protocol = of(Drawing)
    assert protocol.kind == "sampled"
    error = np.sqrt((2 / 3 + 2 / 4) / 2000)  # of the mean of 2000 samples; variances of {1, 2, 3} and of two coins
    assert abs(protocol.rounds - (2 + 1)) < 5 * error
    assert protocol.rounds_most == 3 + 2
    one = 8 * COHORT  # bytes of a number
    assert abs(protocol.bytes_down - one * ((DX + DY) * 3 + DX * (1 + 1))) < 5 * error * one * (2 * DX + DY)


@pytest.mark.parametrize(("kind", "rounds"), [(Until, 7), (Flagged, 1), (Counted, 5)])
def test_what_depends_on_data_is_a_bound(kind, rounds):
    protocol = of(kind)
    assert protocol.kind == "bound"
    assert protocol.rounds == protocol.rounds_most == rounds
    part = 8 * COHORT * (2 * DX + DY)  # with the part that depends on data
    assert protocol.bytes_down == protocol.bytes_down_most == rounds * part
    assert "the most" in str(protocol)


def test_the_table_and_the_json_say_the_same():
    protocol = of(Plain)
    lines = str(protocol).splitlines()
    assert "Plain" in lines[0] and f"{COHORT} of {CLIENTS}" in lines[0]
    assert lines[-1].split()[:2] == ["total", "3"]
    assert any("[more]" in line and line.startswith("gradient") for line in lines)
    read = json.loads(protocol.to_json())
    assert [read[name] for name in COLUMNS] == [getattr(protocol, name) for name in COLUMNS]
