"""The program of an iteration does not touch the states of clients that it does not ask."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.beginning import as_leaves
from fedbilevel.engines import simulation
from fedbilevel.engines.simulated.federation import SimulatedFederation
from fedbilevel.engines.simulated.programs import chunk

CLIENTS = 977


class Remembering(fb.Algorithm):
    """Clients keep what they were sent, and say what they had kept: no reply needs what is kept next."""

    def client_init(self, x, y):
        return x

    def step(self, fed, state):
        return fb.State(state.x + fed.average(self.keep, state.x), state.y), {}

    def keep(self, client, x):
        return fb.Reply(x - client.state, x * jnp.sum(client.rows[0].all().examples))


def compiled(bound, algorithm, state, data):
    """The text of the program of many iterations."""
    carry = bound.start(algorithm, state)
    own = lambda states, *rest: chunk(bound.problem, as_leaves(algorithm), bound._static(), data, states, *rest)
    first, limit, dropout = np.int32(0), np.asarray(1e9), np.float32(0)
    lowered = jax.jit(own).lower((carry.state, carry.client_state), jax.random.key(0), first, first, limit, dropout)
    return lowered.compile().as_text()


def copies():
    """The loops' copies of all clients' states, and how often the compiled program has them at all."""
    rows = np.ones((CLIENTS, 2))
    data = fb.FederatedData.stack(rows, rows)
    problem, algorithm, x = fb.Problem(lambda x, y, e: e * y**2, lambda x, y, e: e * y**2), Remembering(), jnp.ones(3)
    bound = fb.Simulation(cohort=5).bind(problem, data, algorithm, algorithm.init(x, x[0]), jax.random.key(0))
    text = compiled(bound, algorithm, algorithm.init(x, x[0]), data)
    loops, entry = text.split("\nENTRY ")
    copied = rf"f\d+\[{CLIENTS},3\]\S* copy\("
    return len(re.findall(copied, loops)), len(re.findall(copied, entry))


def test_clients_states_are_written_in_place(monkeypatch):
    loops, entry = copies()
    assert loops == 0 and entry == 1
    monkeypatch.setattr(SimulatedFederation, "_after", lambda self, new, all, index: new)
    assert copies()[0] > 0  # what it is there for: the day this fails, XLA has found out by itself


class Rare(fb.Algorithm):
    """Something costly, at a point that the loop leaves as it is; never, in fact."""

    def step(self, fed, state):
        turn = lambda t, _: fed.average(self.costly, state.x, beside=False)
        measured = fed.rarely(jnp.where(state.x[0] > 1e6, 1, 0), turn, jnp.zeros(()))
        return fb.State(state.x * 0.5 + measured, state.y), {}

    def costly(self, client, x):
        return jnp.linalg.eigvalsh(jnp.outer(x, x) + jnp.diag(client.rows[0].all().examples.sum(0)))[0]


def in_every_iteration():
    """How often the loop of iterations computes eigenvalues, which it should not unless it has to."""
    rows = np.ones((4, 2, 3))
    data = fb.FederatedData.stack(list(rows), list(rows))
    problem, algorithm, x = fb.Problem(lambda x, y, e: e[0] * y**2, lambda x, y, e: e[0] * y**2), Rare(), jnp.ones(3)
    state = algorithm.init(x, x[0])
    bound = fb.Simulation().bind(problem, data, algorithm, state, jax.random.key(0))
    text = compiled(bound, algorithm, state, data)
    parts = re.split(r"\n(?=(?:ENTRY )?%\S+ \(.*\{\n)", text)
    named = {match[1]: part for part in parts if (match := re.match(r"(?:ENTRY )?(%\S+) ", part))}
    entry = next(part for part in parts if part.startswith("ENTRY"))
    loop = named[re.search(r" while\(.*body=(%[^\s,]+)", entry)[1]]
    assert "syevd" in text
    return loop.count("syevd")


def test_what_happens_rarely_costs_nothing_else(monkeypatch):
    assert in_every_iteration() == 0
    monkeypatch.setattr(SimulatedFederation, "rarely", fb.Federation.rarely)
    assert in_every_iteration() > 0  # what it is there for: the day this fails, XLA leaves the work in its loop


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_only_those_who_were_asked_and_answered_have_another_state(dropout):
    rows = np.ones((CLIENTS, 2))
    data = fb.FederatedData.stack(rows, rows)
    problem, algorithm, x = fb.Problem(lambda x, y, e: e * y**2, lambda x, y, e: e * y**2), Remembering(), jnp.ones(3)
    engine = fb.Simulation(cohort=40, dropout=dropout)
    bound = engine.bind(problem, data, algorithm, algorithm.init(x, x[0]), jax.random.key(0))
    carry, _ = bound.advance(algorithm, bound.start(algorithm, algorithm.init(x, x[0])), 1, 1e9)
    states = np.asarray(carry.client_state)
    changed = (states != 1).any(1)
    assert (states[changed] == 2).all()
    assert changed.sum() == 40 if not dropout else 5 < changed.sum() < 35


def test_large_states_are_written_in_place_from_chunk_to_chunk_and_the_start_stays(monkeypatch):
    rows = np.ones((CLIENTS, 2))
    data = fb.FederatedData.stack(rows, rows)
    problem, algorithm, x = fb.Problem(lambda x, y, e: e * y**2, lambda x, y, e: e * y**2), Remembering(), jnp.ones(3)
    bound = fb.Simulation(cohort=40).bind(problem, data, algorithm, algorithm.init(x, x[0]), jax.random.key(0))
    start = bound.start(algorithm, algorithm.init(x, x[0]))
    monkeypatch.setattr(simulation, "CAPACITY", 3)
    expected, record = bound.advance(algorithm, start, 7, 1e9)
    monkeypatch.setattr(simulation, "LARGE", 0)
    copied, copy = [], simulation._copied
    monkeypatch.setattr(simulation, "_copied", lambda leaf: copied.append(copy(leaf)) or copied[-1])
    bound.advance(algorithm, start, 0, 1e9)  # compiled
    for _ in range(2):
        copied.clear()
        after, again = bound.advance(algorithm, start, 7, 1e9)
        assert len(copied) == 1 and copied[0].is_deleted()  # for the first of three chunks, and then written to
        np.testing.assert_array_equal(after.client_state, expected.client_state)
        np.testing.assert_array_equal(after.state.x, expected.state.x)
        assert again.rounds == record.rounds and after.iteration == 7
    assert (np.asarray(start.client_state) == 1).all()
    after, _ = bound.advance(algorithm, after, 1, 1e9)  # goes on from there
    assert not np.array_equal(after.client_state, expected.client_state)
