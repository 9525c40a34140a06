"""Clients that drop out, fail, answer nonsense or lose their state: what the policy says is what happens."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.callbacks import Checkpoint
from fedbilevel.engines import loopback
from fedbilevel.engines.faults import Roster, StateLost, TooFewReplies
from fedbilevel.watch import attributes
from helpers import cases
from helpers.quadratic import flat

KEY = jax.random.key(0)
Q = cases.problem()
CLIENTS = 8
FULL = fb.AggITD(inner_rounds=2, inner_lr=0.05, hessian_lr=0.05, outer_lr=0.05, truncation="full")
LOCKSTEP = fb.Lockstep(inner_lr=0.05, hessian_lr=0.05, outer_lr=0.05)
PATIENT = fb.Faults(exclude_after=None)
PLAIN = loopback.InProcess


def solve(algorithm, iterations=4, **settings):
    return fb.solve(Q.problem, Q.data, algorithm, Q.x, Q.y, iterations, key=KEY, **settings)


def ledger(result):
    return [[row[name] for name in ("rounds", "bytes_down", "bytes_up")] for row in result.history]


def numbers(result):
    return np.concatenate([flat(result.x), flat(result.y)])


@pytest.fixture
def trouble(monkeypatch):
    """`trouble(script)`: every client's answer goes through script(client, request, answer), which may raise."""

    def install(script):
        class Troubled(PLAIN):
            def ask(self, requests, deadline):
                answers = super().ask(requests, deadline)
                for client, numbers in list(answers.replies.items()):
                    try:
                        answers.replies[client] = script(client, requests[client], numbers)
                    except Exception as error:
                        del answers.replies[client]
                        answers.failures[client] = error
                return answers

        monkeypatch.setattr(loopback, "InProcess", Troubled)

    return install


def failing(who, when=lambda request: True):
    """A script in which some clients fail, where `when` holds."""

    def script(client, request, numbers):
        if client in who and when(request):
            raise ConnectionError("no route to host")
        return numbers

    return script


# Drop-outs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["aggitd", "lockstep", "one-round"])
@pytest.mark.parametrize("cohort", [pytest.param(None, marks=pytest.mark.slow), 5])
def test_dropping_out_is_the_same_in_both_engines(name, cohort):
    runs = [cases.run(name, engine(cohort, dropout=0.4)) for engine in (fb.Simulation, fb.Loopback)]
    np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=0, atol=1e-12 * np.abs(runs[0][0]).max())
    np.testing.assert_array_equal(runs[0][1], runs[1][1])
    without = cases.run(name, fb.Simulation(cohort))
    assert (runs[0][1][-1, 1] == without[1][-1, 1]) and (runs[0][1][-1, 2] < without[1][-1, 2])  # as much down, less up
    assert np.abs(runs[0][0] - without[0]).max() > 1e-6


def test_nobody_dropping_out_is_the_plain_run():
    plain, rare = (solve(LOCKSTEP, engine=fb.Simulation(dropout=rate)) for rate in (0.0, 1e-9))
    np.testing.assert_allclose(numbers(plain), numbers(rare), rtol=0, atol=1e-14)
    assert ledger(plain) == ledger(rare)


def test_weights_are_scaled_to_those_who_answer():
    data = fb.FederatedData.stack(Q.inner, Q.outer, "rows")
    run = lambda engine: fb.solve(Q.problem, data, FULL, Q.x, Q.y, 4, key=KEY, engine=engine)
    runs = [run(engine(dropout=0.5)) for engine in (fb.Simulation, fb.Loopback)]
    np.testing.assert_allclose(numbers(runs[0]), numbers(runs[1]), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "engine", [fb.Simulation(dropout=0.4), fb.Simulation(5, dropout=0.4), fb.Loopback(5, dropout=0.4)]
)
def test_the_mean_control_variate_stays_the_mean_of_what_clients_keep(engine):
    state = LOCKSTEP.init(Q.x, Q.y)
    execution = engine.bind(Q.problem, Q.data, LOCKSTEP, state, KEY)
    carry, _ = execution.advance(LOCKSTEP, execution.start(LOCKSTEP, state), 6, np.inf)
    kept = carry.client_state
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *kept) if isinstance(kept, list) else kept
    mean = jax.tree.map(lambda leaf: np.mean(leaf, axis=0), stacked)
    assert np.abs(flat(mean)).max() > 1e-3
    np.testing.assert_allclose(flat(attributes(carry.state)["control"]), flat(mean), rtol=0, atol=1e-13)


def test_with_drop_outs_the_solution_is_still_reached():
    end = solve(LOCKSTEP, 6_000, engine=fb.Simulation(dropout=0.3), evaluate_every=6_000)
    assert np.linalg.norm(Q.hypergradient(flat(end.x))) < 1e-6


@pytest.mark.parametrize("rate", [-0.1, 1.0, True, "half"])
def test_a_dropout_that_is_no_probability_is_refused(rate):
    with pytest.raises(fb.InputError, match="dropout="):
        fb.Simulation(dropout=rate)


# Failures -------------------------------------------------------------------------------------------------------------


def test_without_a_policy_the_first_failure_ends_the_run(trouble):
    trouble(failing({2}))
    with pytest.raises(ConnectionError, match="no route"):
        solve(FULL, engine=fb.Loopback())


def test_those_who_answer_are_averaged(trouble):
    trouble(failing({2}))
    result = solve(FULL, engine=fb.Loopback(faults=PATIENT))
    rest = [i for i in range(CLIENTS) if i != 2]
    others = fb.FederatedData.stack([Q.inner[i] for i in rest], [Q.outer[i] for i in rest])
    expected = fb.solve(Q.problem, others, FULL, Q.x, Q.y, 4, key=KEY)
    np.testing.assert_allclose(numbers(result), numbers(expected), rtol=0, atol=1e-13)
    whole = solve(FULL)
    assert ledger(result)[-1][:2] == ledger(whole)[-1][:2] and ledger(result)[-1][2] < ledger(whole)[-1][2]


SPOILT = {
    "short": lambda numbers: numbers[:-1],
    "long": lambda numbers: numbers + numbers,
    "empty": lambda numbers: b"",
    "not finite": lambda numbers: np.full(len(numbers) // 8, np.nan).tobytes(),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_nonsense_counts_as_a_failure(trouble, spoil):
    trouble(lambda client, request, numbers: spoil(numbers) if client == 2 else numbers)
    nonsense = solve(FULL, engine=fb.Loopback(faults=PATIENT))
    trouble(failing({2}))
    np.testing.assert_array_equal(numbers(nonsense), numbers(solve(FULL, engine=fb.Loopback(faults=PATIENT))))


def test_numbers_that_no_client_has_finite_are_the_iterates_fault():
    wild = fb.AggITD(inner_rounds=2, inner_lr=1e200, hessian_lr=1e200, outer_lr=1e200)
    with pytest.raises(fb.Diverged):
        solve(wild, engine=fb.Loopback(faults=PATIENT))


def test_an_exchange_with_too_few_replies_is_tried_again_and_leaves_no_trace(trouble):
    trouble(failing({1, 3, 4, 5, 6}, when=lambda request: request.tag[0] in (1, 2) and request.tag[2] == 0))
    tried = solve(LOCKSTEP, 6, engine=fb.Loopback(faults=PATIENT))
    plain = solve(LOCKSTEP, 6)
    np.testing.assert_allclose(numbers(tried), numbers(plain), rtol=0, atol=1e-13)
    assert tried.history[-1]["rounds"] == plain.history[-1]["rounds"] + 2


def test_another_attempt_asks_a_fresh_cohort(trouble):
    asked, down = [], failing(range(CLIENTS), lambda request: request.tag == (1, 0, 0))
    trouble(lambda client, request, numbers: asked.append((request.tag, client)) or down(client, request, numbers))
    solve(LOCKSTEP, 3, engine=fb.Loopback(cohort=3, faults=PATIENT))
    of = lambda tag: {client for at, client in asked if at == tag}
    assert len(of((1, 0, 0))) == len(of((1, 0, 1))) == 3 and of((1, 0, 0)) != of((1, 0, 1))


def test_too_few_replies_end_the_run_with_a_checkpoint_to_go_on_from(trouble, tmp_path):
    down = lambda request: request.tag[0] >= 3
    trouble(failing(range(6), down))
    engine = lambda: fb.Loopback(faults=fb.Faults(retries=2, exclude_after=None))
    with pytest.raises(TooFewReplies, match=r"2 of 8 clients answered moves in iteration 4, tried 3 times.*no route"):
        solve(LOCKSTEP, 6, engine=engine(), callbacks=[Checkpoint(tmp_path)])
    trouble(failing(()))
    resumed = solve(LOCKSTEP, 6, engine=engine(), resume=tmp_path)
    np.testing.assert_allclose(numbers(resumed), numbers(solve(LOCKSTEP, 6)), rtol=0, atol=1e-13)


def test_a_client_that_fails_too_often_is_left_out_and_asked_again_later():
    roster = Roster(4, fb.Faults(exclude_after=2, readmit_after=5))
    error = {1: ConnectionError("gone")}
    always = lambda client: True
    roster.note({0, 2, 3}, error, 1)
    assert roster.left_out(always) == set()
    roster.note({0, 2, 3}, error, 1)
    assert roster.left_out(always) == {1}
    for _ in range(4):
        roster.note({0, 2, 3}, {}, 1)
    assert roster.left_out(always) == {1}
    roster.note({0, 2, 3}, {}, 1)
    assert roster.left_out(lambda client: False) == {1}  # not there yet: five more
    for _ in range(5):
        roster.note({0, 2, 3}, {}, 1)
    assert roster.left_out(always) == set()
    roster.note({0, 2, 3}, error, 1)  # one more failure: it has not answered in between
    assert roster.left_out(always) == {1}


def test_a_failure_now_and_then_leaves_nobody_out():
    roster = Roster(2, fb.Faults(exclude_after=2))
    for _ in range(5):
        roster.note({0}, {1: ConnectionError()}, 1)
        roster.note({0, 1}, {}, 1)
    assert roster.left_out(lambda client: True) == set()


def test_a_client_left_out_is_not_asked(trouble):
    asked = []
    trouble(lambda c, request, n: asked.append((c, request.tag)) or failing({2})(c, request, n))
    faults = fb.Faults(exclude_after=2, readmit_after=3)
    result = solve(LOCKSTEP, 8, engine=fb.Loopback(faults=faults))
    assert [tag[0] for client, tag in asked if client == 2] == [0, 1, 5]  # then left out for three rounds, and again
    assert result.iteration == 8


# State ----------------------------------------------------------------------------------------------------------------


def _losing(monkeypatch, iteration):
    from fedbilevel.engines.messaging.client_side import ClientSide

    answer, lost = ClientSide.answer, []

    def forgetful(self, request):
        if self._index == 3 and request.tag[0] == iteration and not lost:
            lost.append(request.tag)
            self.states = {}
        return answer(self, request)

    monkeypatch.setattr(ClientSide, "answer", forgetful)


def test_lost_state_is_rebuilt_everywhere(monkeypatch):
    _losing(monkeypatch, 3)
    engine = fb.Loopback(faults=fb.Faults())
    state = LOCKSTEP.init(Q.x, Q.y)
    execution = engine.bind(Q.problem, Q.data, LOCKSTEP, state, KEY)
    carry, record = execution.advance(LOCKSTEP, execution.start(LOCKSTEP, state), 5, np.inf)
    assert record.done == 5
    mean = jax.tree.map(lambda *leaves: np.mean(np.stack(leaves), 0), *carry.client_state)
    np.testing.assert_allclose(flat(attributes(carry.state)["control"]), flat(mean), rtol=0, atol=1e-13)
    monkeypatch.undo()
    three = solve(LOCKSTEP, 3).state  # what the rebuilt run goes on from, with everything but x and y at its beginning
    again = fb.solve(Q.problem, Q.data, LOCKSTEP, three.x, three.y, 2, key=KEY)
    np.testing.assert_allclose(np.concatenate([flat(carry.state.x), flat(carry.state.y)]), numbers(again), atol=1e-13)


def test_a_client_that_cannot_keep_its_state_ends_the_run(monkeypatch):
    from fedbilevel.engines.messaging.client_side import ClientSide

    answer = ClientSide.answer

    def forgetful(self, request):
        if self._index == 3:
            self.states = {}
        return answer(self, request)

    monkeypatch.setattr(ClientSide, "answer", forgetful)
    with pytest.raises(StateLost, match="client 3 has no state"):
        solve(LOCKSTEP, 5, engine=fb.Loopback(faults=fb.Faults()))


def test_or_the_run_stops(monkeypatch):
    _losing(monkeypatch, 3)
    with pytest.raises(StateLost, match="client 3 has no state"):
        solve(LOCKSTEP, 5, engine=fb.Loopback(faults=fb.Faults(lost_state="stop")))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("minimum", 0),
        ("deadline", 0),
        ("deadline", "soon"),
        ("retries", -1),
        ("exclude_after", 0),
        ("readmit_after", 1.5),
        ("lost_state", "pray"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name, value):
    with pytest.raises(fb.InputError, match=name):
        fb.Faults(**{name: value})


def test_the_default_minimum_is_half_of_the_cohort():
    assert [fb.Faults().enough(n) for n in (1, 2, 3, 10)] == [1, 1, 2, 5]
    assert fb.Faults(minimum=7).enough(4) == 4
