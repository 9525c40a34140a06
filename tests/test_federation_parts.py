"""`fed.average(combine=("mean", "maximum"))`: one exchange, each part of its reply in its own way."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.cohorts import combine_replies
from fedbilevel.engines.messaging.client_side import ClientSide, Methods
from fedbilevel.engines.messaging.transport import START, Request
from helpers import cases
from helpers.parts import PARTS, Parts, ledger
from helpers.quadratic import flat, quadratic

KEY = jax.random.key(0)
WEIGHTS = [0.4, 0.05, 0.05, 0.1, 0.1, 0.1, 0.1, 0.1]
ENGINES = (fb.Simulation, fb.Loopback)


def solve(how, engine, weights=None, batch_size=None):
    """Three iterations over eight ragged clients."""
    q = quadratic(seed=1, clients=8, sizes=((5, 3), (2, 4)))
    data = fb.FederatedData.stack(q.inner, q.outer, weights)
    return fb.solve(q.problem, data, Parts(how, batch_size), q.x, q.y, 3, key=KEY, engine=engine, check=False)


def same(one, other):
    np.testing.assert_allclose(flat(one), flat(other), rtol=0, atol=1e-12 * np.abs(flat(other)).max())


SETTINGS = {
    "cohort": ({"cohort": 4, "dropout": 0.4}, {"batch_size": 2}),
    "weighted": ({"dropout": 0.4}, {"weights": WEIGHTS}),
    "drawn": ({"cohort": 3}, {"weights": WEIGHTS}),
}


@pytest.fixture(scope="module")
def simulated():
    done: dict[Any, Any] = {}

    def get(name, how="parts"):
        engine, setting = SETTINGS[name]
        if (name, how) not in done:
            done[name, how] = solve(how, fb.Simulation(**engine), **setting)
        return done[name, how]

    return get


@pytest.mark.parametrize("name", ["cohort", "weighted"])
def test_each_part_is_what_an_exchange_of_its_own_gives(simulated, name):
    """The same clients are asked and drop out, the same rows are drawn: the numbers are the same."""
    parts, mean, maximum = (simulated(name, how) for how in ("parts", *PARTS))
    same(parts.state.seen[0], mean.state.seen[0])
    same(parts.state.seen[1], maximum.state.seen[1])
    assert np.abs(flat(mean.state.seen[1]) - flat(maximum.state.seen[1])).min() > 1e-3
    assert np.abs(flat(mean.state.seen[0]) - flat(maximum.state.seen[0])).min() > 1e-3
    for other in (mean, maximum):
        np.testing.assert_array_equal(ledger(parts), ledger(other))
    assert parts.history[-1]["rounds"] == 3 and parts.protocol.rounds == 1


@pytest.mark.parametrize("name", SETTINGS)
def test_loopback_is_the_simulation(simulated, name):
    engine, setting = SETTINGS[name]
    looped, expected = solve("parts", fb.Loopback(**engine, shuffle=3), **setting), simulated(name)
    same(looped.state.seen, expected.state.seen)
    np.testing.assert_array_equal(ledger(looped), ledger(expected))


@pytest.mark.parametrize("more", [{"client_batch": 3}, {"client_state": "disk"}], ids=str)
def test_clients_in_batches_and_states_on_disk_change_nothing(simulated, more):
    engine, setting = SETTINGS["cohort"]
    same(solve("parts", fb.Simulation(**engine, **more), **setting).state.seen, simulated("cohort").state.seen)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_exchanges_with_one_cohort_are_one_round_more_and_the_same_numbers(engine):
    one, two = (solve(how, engine(cohort=4)) for how in ("one", "two"))
    for part, leaf in ((0, "h"), (1, "curved")):  # not what depends on how often a client was asked
        same(one.state.seen[part][leaf], two.state.seen[part][leaf])
    assert (one.protocol.rounds, two.protocol.rounds) == (1, 2)
    assert one.protocol.bytes_up == two.protocol.bytes_up and 2 * one.protocol.bytes_down == two.protocol.bytes_down


def test_a_part_may_be_of_whole_numbers_and_the_maximum_leaves_them_whole():
    replies = ({"a": jnp.array([1, 2, 6])}, jnp.array([3, -1, 2]))
    mean, largest = combine_replies(PARTS, replies, None, jnp.array([True, False, True]))
    assert mean["a"] == 3.5 and largest == 3 and largest.dtype == replies[1].dtype


# What is declared and printed ---------------------------------------------------------------------


class Asking(fb.Algorithm):
    """One exchange with these arguments, beside another of the same method."""

    combine: Any = fb.option("mean")
    replies: Any = fb.option(True)

    def step(self, fed, state):
        fed.average(self.both, state.x)
        fed.average(self.both, state.x, combine=self.combine, replies=self.replies, beside=True)
        return state, {}

    def both(self, client, x):
        wanted = jnp.asarray(len(client.wanted), jnp.int32)
        return {"x": x}, wanted


def protocol(engine=None, **asked):
    q = cases.problem()
    return fb.protocol(Asking(**asked), q.problem, q.data, q.x, q.y, engine)


def test_the_protocol_says_how_each_part_is_combined():
    told = protocol(combine=PARTS)
    first, second = told.exchanges
    assert (first.up, second.up) == ("44 B", "40 B, 4 B maximum")
    assert (first.combine, second.combine) == (("mean",), PARTS)
    assert "40 B, 4 B maximum" in str(told) and told.to_dict()["exchanges"][1]["combine"] == PARTS
    assert second.name == "both (same round)" and told.rounds == 1
    assert first.bytes_up == second.bytes_up


def test_a_part_that_travels_sometimes_has_its_way_too():
    told = protocol(combine=("maximum", "mean"), replies=(True, False)).exchanges[1]
    assert told.up == "40 B maximum, [4 B]" and told.bytes_up == 8 * 40
    assert protocol(combine="maximum", replies=(True, True)).exchanges[1].up == "40 B maximum, 4 B maximum"
    assert protocol(combine=("maximum",)).exchanges[1].up == "44 B maximum"  # one part is the whole reply


def test_servers_and_sites_agree_on_it():
    from fedbilevel.engines.nvflare.agreement import fingerprint

    marks = [fingerprint(protocol(combine=combine)) for combine in (PARTS, PARTS[::-1], ("mean", "mean"), "mean")]
    assert len(set(marks)) == 3 and marks[2] == marks[3]


def test_a_client_refuses_a_request_of_who_knows_nothing_of_parts():
    """As a server of an earlier version would ask: one flag for the whole reply."""
    q, told = cases.problem(), protocol(combine=PARTS)
    rows = q.data.inner.alone(0), q.data.outer.alone(0)
    client = ClientSide(q.problem, rows, Asking(PARTS), told, KEY, 0, None, Methods())
    ask = lambda wanted: client.answer(Request(1, (0, 1, 0), (), wanted, START, START, b""))
    with pytest.raises(fb.RunError, match="flags for other parts than the protocol's"):
        ask((True,))
    with pytest.raises(fb.RunError, match="bytes arrived"):  # as far as that it is understood
        ask((True, True))


REFUSED = {
    "a name": ({"combine": "median"}, r'is "mean" or "maximum", or a tuple .* got \'median\''),
    "a name of a part": ({"combine": ("mean", "largest")}, r"got \('mean', 'largest'\)"),
    "a list": ({"combine": ["mean", "maximum"]}, r"got \['mean', 'maximum'\]"),
    "nothing": ({"combine": ()}, r"got \(\)"),
    "no name": ({"combine": (2, None)}, r"got \(2, None\)"),
    "parts": (
        {"combine": ("mean", "mean", "maximum")},
        r"combine= has 3 ways .* Asking\.both, which is .* as many parts",
    ),
    "flags": ({"combine": PARTS, "replies": (True,)}, "has 2 ways to combine, and replies= 1 flags"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_is_no_way_to_combine_is_refused_before_anything_runs(wrong):
    asked, sentence = REFUSED[wrong]
    with pytest.raises(fb.InputError, match=sentence) as refusal:
        protocol(**asked)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_refuse_it_at_the_start(engine):
    q = cases.problem()
    with pytest.raises(fb.InputError, match="has 3 ways to combine the reply"):
        fb.solve(q.problem, q.data, Asking(("mean",) * 3), q.x, q.y, 1, key=KEY, engine=engine(), check=False)
