"""Algorithms that advance in the same rounds: each as it would alone, in fewer rounds."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.algorithms import ALGORITHMS
from fedbilevel.beginning import as_leaves
from fedbilevel.pace.automatic import STEPS, Auto, ready
from fedbilevel.race.family import Family
from fedbilevel.race.racing import Race
from helpers.quadratic import quadratic

KEY = jax.random.key(0)
AUTO = dict.fromkeys(STEPS, "auto")
Q = quadratic(clients=4, sizes=((3, 3), (5, 4)))
SMALL = {"inner_rounds": 2, "neumann_terms": 2, "local_steps": 2}
TEMPOS = (1.0, 3.0)
OWN = ("fedbioacc-local",)  # clients have a y of their own
EACH = [
    pytest.param(name, marks=() if name in ("lockstep", "aggitd") else pytest.mark.slow)
    for name in ALGORITHMS
    if name not in OWN
]


def automatic(name, **settings):
    words = {field.name: field.metadata.get("words", ()) for field in dataclasses.fields(ALGORITHMS[name])}
    found = {step: "auto" for step in STEPS if "auto" in words.get(step, ())}
    return ALGORITHMS[name](**{k: v for k, v in (found | SMALL | settings).items() if k in words})


def family(name, **settings):
    """Of two paces."""
    one = ready(automatic(name, **settings), Q.x)
    paced = [dataclasses.replace(one, tempo=tempo) if isinstance(one, Auto) else one for tempo in TEMPOS]
    return Family.of(name, [as_leaves(each) for each in paced])


def solve(algorithm, iterations=5, q=Q, **more):
    return fb.solve(q.problem, q.data, algorithm, q.x, q.y, iterations, key=KEY, **more)


def lane(tree, k):
    return jax.tree.map(lambda leaf: leaf[k], tree)


@pytest.mark.parametrize("name", EACH)
def test_a_setting_does_what_it_would_do_alone(name):
    """With a cohort, minibatches and dropout, drawn alike."""
    own, engine = family(name, batch_size=2), fb.Simulation(cohort=3, dropout=0.2)
    race = solve(Race((own,)), engine=engine)
    for k in range(own.size):
        alone = solve(own.one(k), engine=engine)
        assert fb.testing.distance(lane(race.state.members[0], k), alone.state) <= 1e-10
        assert race.history[-1]["rounds"] == alone.history[-1]["rounds"]
        for name in ("bytes_down", "bytes_up"):
            assert race.history[-1][name] == own.size * alone.history[-1][name]


@pytest.mark.slow
def test_several_algorithms_share_their_rounds_and_add_their_bytes():
    families = family("lockstep"), family("simfbo")
    race = solve(Race(families))
    alone = [[solve(each.one(k)) for k in range(each.size)] for each in families]
    for member, runs in zip(race.state.members, alone, strict=True):
        for k, run in enumerate(runs):
            assert fb.testing.distance(lane(member, k), run.state) <= 1e-10
    runs = [run for runs in alone for run in runs]
    assert {run.history[-1]["rounds"] for run in runs} == {race.history[-1]["rounds"]}
    for name in ("bytes_down", "bytes_up"):
        assert race.history[-1][name] == sum(run.history[-1][name] for run in runs)
    assert fb.testing.distance((race.x, race.y), (alone[0][0].x, alone[0][0].y)) <= 1e-10  # the first one leads


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aggitd", "fednest"])
def test_what_takes_a_round_goes_along_in_every_round_of_what_takes_more(name):
    """In loops of rounds too: each does what it would alone in as many rounds."""
    longer, single = family(name, truncation="full"), family("lockstep")
    race, own = solve(Race((longer, single)), 3), solve(longer.one(1), 3)
    rounds = race.history[-1]["rounds"]
    assert rounds == own.history[-1]["rounds"]
    assert fb.testing.distance(lane(race.state.members[0], 1), own.state) <= 1e-10
    measured = 1  # round, at the start
    alone = solve(single.one(1), int(rounds) - measured)
    assert fb.testing.distance(lane(race.state.members[1], 1), alone.state) <= 1e-10
    for each in ("bytes_down", "bytes_up"):
        assert race.history[-1][each] == 2 * (own.history[-1][each] + alone.history[-1][each])


@pytest.mark.slow
@pytest.mark.parametrize("names", [("lockstep", "simfbo"), ("aggitd", "simfbo")])
def test_engines_agree(names):
    race = Race(tuple(family(name, batch_size=2) for name in names))
    weighted = dataclasses.replace(Q, data=fb.FederatedData.stack(Q.inner, Q.outer, weights="rows"))
    for q, more in ((Q, {"cohort": 3}), (weighted, {})):
        ends = [solve(race, 3, q, engine=engine(dropout=0.2, **more)) for engine in (fb.Simulation, fb.Loopback)]
        assert fb.testing.distance(ends[0].state.members, ends[1].state.members) <= 1e-10
        for name in ("rounds", "bytes_down", "bytes_up"):
            np.testing.assert_array_equal(ends[0].history.column(name), ends[1].history.column(name))


def test_one_message_carries_what_several_ask():
    race = Race((family("lockstep"), family("simfbo")))
    known = fb.protocol(race, Q.problem, Q.data, Q.x, Q.y)
    assert (known.rounds, known.rounds_rarely) == (1, 1) and len(known.exchanges) == 1
    names = [line.name for line in (*known.exchanges, *known.rarely)]
    assert all(name.count("lockstep.") == name.count("simfbo.") == 1 for name in names)


def test_a_setting_that_blows_up_is_out_and_harms_nobody():
    good, bad = ({"inner_lr": step, "hessian_lr": 0.02, "outer_lr": 0.02} for step in (0.02, 1e6))
    own = Family.of("lockstep", [as_leaves(fb.Lockstep(**each, local_steps=2)) for each in (good, bad)])
    race = solve(Race((own,)), 30)
    assert np.asarray(race.state.alive[0]).tolist() == [True, False]
    assert fb.testing.distance(lane(race.state.members[0], 0), solve(own.one(0), 30).state) <= 1e-10
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(race.state))


def test_where_clients_lose_their_states_each_begins_again_where_it_is():
    """And who has blown up stays out."""
    race = Race((family("lockstep"), family("simfbo")))
    state = solve(race, 8).state
    state = dataclasses.replace(state, alive=(jnp.array([True, False]), state.alive[1]))
    again = race.begun_again(state)
    assert [np.asarray(alive).tolist() for alive in again.alive] == [[True, False], [True, True]]
    for before, after in zip(state.members, again.members, strict=True):
        assert fb.testing.distance((before.x, before.y), (after.x, after.y)) == 0
    assert not np.any(np.asarray(again.members[0].memory.iteration))  # all else is anew
    own = Race((family("lockstep"),)).families[0]
    fresh = own.one(0).init(lane(state.members[0], 0).x, lane(state.members[0], 0).y)
    assert fb.testing.distance(lane(again.members[0], 0), fresh) == 0


def test_a_race_of_some_is_ordered_as_they_are():
    race = Race((family("lockstep"), family("simfbo")))
    assert [race.place(k) for k in range(race.size)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert race.in_order([3, 0, 2]) == [3, 2, 0]
    smaller = race.only([race.place(k) for k in race.in_order([3, 0, 2])])
    assert [each.name for each in smaller.families] == ["simfbo", "lockstep"]
    assert np.asarray(smaller.families[0].algorithm.tempo).tolist() == [3.0, 1.0]
    assert isinstance(race.only([(1, 1)]), Auto)
