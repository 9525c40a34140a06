"""Curvature that grows between two measurements: measured again, gone back, the automatic step halved.

`flat`: a pseudo-Huber loss begun far from its data, where it is flat; `jump`: a penalty that is a
thousand times as large once x has passed one. With a step that a user would choose by hand (0.5, or
below 2 / 1000) the same runs end well.
"""

from __future__ import annotations

import csv
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.callbacks import CSV, Callback, Checkpoint
from fedbilevel.engines.base import Engine, plan
from fedbilevel.engines.loopback import InProcess
from fedbilevel.engines.messaging.client_side import ClientSide, Methods
from fedbilevel.engines.messaging.server_side import Messaging
from fedbilevel.pace.curvature import EVERY, HALVINGS
from fedbilevel.problem import strong
from fedbilevel.protocol import as_leaves, client_state
from fedbilevel.protocol import step as one_iteration
from helpers.quadratic import flat as numbers

KEY = jax.random.key(0)
DIM, CLIENTS = 2, 4
ROWS = [{"c": np.array([[0.1 * i, -0.1 * i]])} for i in range(CLIENTS)]
DATA = fb.FederatedData.stack(ROWS, ROWS)


def huber(x, y, e):
    return jnp.sum(jnp.sqrt(1 + (y - 30 - e["c"]) ** 2)) + 0.5 * jnp.sum(jnp.exp(x) * y**2)


def threshold(x, y, e):
    penalty = 0.5 * jnp.where(x[0] > 1, 1000.0, 1.0) * jnp.sum(y**2)
    return 0.5 * jnp.sum((y - e["c"] - 3) ** 2) + penalty + 1e-3 * jnp.sum(x * y)


PROBLEMS = {
    "flat": fb.Problem(huber, lambda x, y, e: 0.5 * jnp.sum((y - 29) ** 2)),
    "jump": fb.Problem(threshold, lambda x, y, e: 0.5 * jnp.sum((y - 3) ** 2) + 0.5 * jnp.sum((x - 2) ** 2)),
}
BEGIN = {"flat": -5.0, "jump": 0.0}
LOWER = {"flat": 0.3, "jump": 2e-4}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    name: (kind, {}) for name, kind in fb.algorithms.ALGORITHMS.items() if "hessian_lr" in kind.__dataclass_fields__
} | {
    "aggitd-full": (fb.AggITD, {"truncation": "full"}),
    "aggitd-warm": (fb.AggITD, {"truncation": "full", "warm_start_v": True, "one_round": True}),
    "fednest-full": (fb.FedNest, {"truncation": "full"}),
    "lfednest-full": (fb.LFedNest, {"truncation": "full"}),
}


def algorithm(name, case="flat", **settings):
    kind, more = KINDS[name]
    rounds = {"inner_rounds": 5} if "inner_rounds" in kind.__dataclass_fields__ else {}
    usual = {"hessian_lr": "auto", "inner_lr": LOWER[case], "outer_lr": 0.05, "local_steps": 5}
    return kind(**usual | rounds | more | settings)


def solve(name, iterations, case="flat", engine=None, settings=None, **more):
    chosen = algorithm(name, case, **(settings or {}))
    x, y = jnp.full(DIM, BEGIN[case]), jnp.zeros(DIM)
    budget = {"rounds": iterations.stop} if isinstance(iterations, range) else {"iterations": iterations}
    return fb.solve(PROBLEMS[case], DATA, chosen, x, y, key=KEY, engine=engine, **budget, **more)


def books(result, *columns):
    columns = columns or ("iteration", "rounds", "bytes_down", "bytes_up", "halvings")
    return [[row[name] for name in columns] for row in result.history]


# Nothing blows up -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), list(zip(KINDS, itertools.cycle(PROBLEMS), strict=False)))
def test_every_algorithm_survives_curvature_that_grows(name, case):
    end = solve(name, 400, case)
    if case == "jump":
        np.testing.assert_allclose(end.x, 2.0, atol=1e-3)
        np.testing.assert_allclose(end.y, 3 / 1001, atol=1e-3)
    else:  # the clients' data are at 30, and y goes there
        assert ((end.y > 28.9) & (end.y < 30.3)).all()
        assert end.history[-1]["halvings"] <= 6  # on its way y meets a curvature 150 times that of the start
    halvings, rounds = (end.history.column(name) for name in ("halvings", "rounds"))
    assert (np.diff(halvings) >= 0).all() and (np.diff(rounds) > 0).all()
    np.testing.assert_array_equal(end.history.column("iteration"), np.arange(401))
    assert list(end.history[0])[-1] == "halvings"


def test_clients_that_meet_the_jump_within_a_round_do_not_throw_x():
    """The clients' own x pass one within a round; at the server, where the curvature is measured, it has not."""
    end = solve("adafbio", 30, "jump", metrics={"first": lambda x, y: x[0]})
    assert np.abs(end.history.column("first")).max() < 3
    assert end.history[-1]["halvings"] > 2


class Given(Callback):
    """Notes where the best so far was when the run went back, and which rows it saw before."""

    def __init__(self):
        self.rows, self.back = [], []

    def record(self, run, rows):
        self.rows.append(run.kept.best.iteration)

    def went_back(self, run):
        self.back.append((max(self.rows), run.kept.best.iteration))


def test_the_best_of_a_run_that_goes_back_is_among_the_rows_that_stay():
    seen = Given()
    end = solve("lockstep", 40, metrics={"size": lambda x, y: jnp.max(jnp.abs(x))}, keep="size:max", callbacks=[seen])
    size, best = end.history.column("size"), end.best()
    assert seen.back == [(18, 0)]  # rows up to 18 and more are given up
    assert (best.iteration, best.value) == (size.argmax(), size.max()) and best.value == np.abs(best.x).max()


@pytest.mark.slow
def test_vectors_that_stay_with_the_clients_are_watched():
    """v_i is thrown in one round, and x only in the next: the mean of |v_i| tells at once."""
    chosen = algorithm("fedbioacc-local", "jump", outer_lr=0.02)
    start = jnp.full(DIM, BEGIN["jump"]), jnp.zeros(DIM)
    metrics = {"first": lambda x, y: x[0]}
    end = fb.solve(PROBLEMS["jump"], DATA, chosen, *start, 250, key=KEY, metrics=metrics, check=False)
    assert np.abs(end.history.column("first")).max() < 3
    np.testing.assert_allclose(end.x, 2.0, atol=0.05)


def test_a_step_that_is_a_number_is_never_changed():
    lam = 1 / (1.2 * (np.exp(-5.0) + 31.0**-3))  # what is measured at the start
    with pytest.raises(fb.Diverged) as error:
        solve("lockstep", 400, settings={"hessian_lr": lam})
    assert error.value.result.history.columns[-1] != "halvings"
    assert "halved" not in str(error.value)


def test_after_ten_halvings_the_run_ends_with_the_sentence():
    with pytest.raises(fb.Diverged, match=rf"lower inner_lr.*halved {HALVINGS} times") as error:
        solve("lockstep", 400, "jump", settings={"inner_lr": 10.0})
    result = error.value.result
    assert result.history[-1]["halvings"] == HALVINGS
    assert result.history[-1]["rounds"] < (HALVINGS + 2) * (EVERY + 40)  # cheap


def pulled(x, y, e):
    return 0.5 * jnp.where(x[0] > 1, 30.0, 1.0) * jnp.sum((y - 3) ** 2)


@pytest.mark.parametrize("engine", [fb.Simulation, pytest.param(fb.Loopback, marks=pytest.mark.slow)])
def test_a_vector_that_grows_with_the_outer_loss_is_no_blow_up(engine):
    """The outer loss is thirty times as steep once x has passed one: v is too, with the right step."""
    problem = fb.Problem(lambda x, y, e: 0.5 * jnp.sum((y - x - e["c"]) ** 2), pulled)
    lockstep = fb.Lockstep(inner_lr=0.5, hessian_lr="auto", outer_lr=0.003, local_steps=1)
    start = jnp.full(DIM, 0.98), jnp.full(DIM, 0.98)
    metrics = {"first": lambda x, y: x[0]}
    end = fb.solve(problem, DATA, lockstep, *start, 100, key=KEY, engine=engine(), metrics=metrics)
    np.testing.assert_allclose(end.x, [2.85, 3.15], atol=0.02)
    assert end.history[-1]["halvings"] == 0
    np.testing.assert_array_equal(end.history.column("iteration"), np.arange(101))
    crossed = int(np.argmax(end.history.column("first") > 1))
    rounds = np.diff(end.history.column("rounds"))
    near = rounds[crossed - 1 : crossed + 3]
    assert near.max() == 2  # taken again: one round in vain, and once more with a measurement beside it
    assert rounds.sum() == end.history[-1]["rounds"]


# The same on every engine ---------------------------------------------------------------------------------------------


class Sites(Engine):
    """Clients that keep their states by tags, as sites of a network do: a carry holds tags, one iteration at a time."""

    cohort = None

    def __init__(self, algorithm, state):
        self.algorithm, self.first = algorithm, client_state(algorithm, state)

    def bind(self, problem, data, algorithm, state, key, program=one_iteration):
        protocol = plan(self, problem, data, algorithm, state, data.clients, program)
        rows = [(data.inner.alone(i), data.outer.alone(i)) for i in range(data.clients)]
        transport, methods, leaves = InProcess(0), Methods(), as_leaves(algorithm)
        transport.members = self.members = [
            ClientSide(problem, rows[i], leaves, protocol, key, i, self.first, methods) for i in range(data.clients)
        ]
        parts = (self, problem, data, key, protocol, program)
        return OneByOne(*parts, transport=transport, faults=None, dropout=0.0)


class OneByOne(Messaging):
    longest = 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lockstep", "fedbioacc-local"])
def test_every_engine_goes_back_alike(name):
    settings = {"share_lower": True} if name == "fedbioacc-local" else {}
    chosen = algorithm(name, **settings)
    sites = Sites(chosen, strong(chosen.init(jnp.full(DIM, BEGIN["flat"]), jnp.zeros(DIM))))
    ends = [solve(name, 45, engine=engine, settings=settings) for engine in (fb.Simulation(), fb.Loopback(), sites)]
    assert ends[0].history[-1]["halvings"] >= 1
    for other in ends[1:]:
        assert fb.testing.distance(ends[0].state, other.state) <= 1e-10
        assert books(ends[0]) == books(other)
    kept = [sorted(tag[0] for tag in member.states) for member in sites.members]
    assert all(
        tags[0] == 39 and tags[-1] >= 43 for tags in kept
    )  # those of the snapshot after 40 iterations, and later


@pytest.mark.slow
def test_draws_and_cohorts_come_again():
    settings = {"batch_size": 1, "inner_rounds": 2}
    ends = [solve("aggitd-warm", 40, engine=engine(3), settings=settings) for engine in (fb.Simulation, fb.Loopback)]
    assert ends[0].history[-1]["halvings"] >= 1
    assert fb.testing.distance(ends[0].state, ends[1].state) <= 1e-12
    assert books(ends[0]) == books(ends[1])


@pytest.mark.parametrize("stop", [3, 12, 25])
def test_after_a_resume_the_run_goes_back_to_the_same(tmp_path, stop):
    whole = solve("lockstep", 60)
    solve("lockstep", stop, callbacks=[Checkpoint(tmp_path)])
    resumed = solve("lockstep", 60, resume=tmp_path, callbacks=[CSV(tmp_path / "history.csv")])
    np.testing.assert_array_equal(numbers(strong_numbers(whole)), numbers(strong_numbers(resumed)))
    assert books(whole) == books(resumed)
    with (tmp_path / "history.csv").open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert [[int(row[name]) for name in ("iteration", "rounds")] for row in rows] == books(whole, "iteration", "rounds")


class Struck(Callback):
    """Fails, or stops the run, when it goes back."""

    def __init__(self, act):
        self._act = act

    def went_back(self, run):
        self._act(run)


@pytest.mark.parametrize("fails", [True, False])
def test_a_callback_that_fails_or_stops_it_when_it_goes_back_loses_nothing(tmp_path, fails):
    whole, file = solve("lockstep", 60), tmp_path / "history.csv"
    act = (lambda run: run.history[99]) if fails else (lambda run: run.stop("gone back"))
    try:
        part = solve("lockstep", 60, callbacks=[Struck(act), CSV(file), Checkpoint(tmp_path)])
    except fb.RunError as error:
        assert str(error) == "the callback Struck failed: IndexError: list index out of range"
        part = error.result
    assert part.stopped == (None if fails else "gone back")
    assert part.iteration < 60 and books(part) == books(whole)[: len(part.history)]
    with file.open(newline="") as text:
        assert len(list(csv.DictReader(text))) == len(part.history) == part.iteration + 1
    resumed = solve("lockstep", 60, resume=tmp_path)
    np.testing.assert_array_equal(numbers(strong_numbers(whole)), numbers(strong_numbers(resumed)))
    assert books(whole) == books(resumed)


def strong_numbers(result):
    return [leaf for leaf in jax.tree.leaves(result.state) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def test_rounds_of_what_was_given_up_stay_spent(monkeypatch):
    """The history's rounds are all that were made: Loopback's exchanges, counted one by one."""
    made, ask = [], InProcess.ask
    asked = lambda requests: next(iter(requests.values())).place
    monkeypatch.setattr(
        InProcess, "ask", lambda self, requests, deadline: made.append(asked(requests)) or ask(self, requests, deadline)
    )
    end = solve("lockstep", 25, engine=fb.Loopback())
    assert end.history[-1]["halvings"] >= 1
    sites = [site for _, site in sorted(end.protocol.sites.items())]
    assert end.history[-1]["rounds"] == sum(sites[place].round for place in made)
    assert {sites[place].name for place in made} == {"meter.begin", "moves", "meter.curvature"}


def test_a_budget_of_rounds_holds():
    end = solve("lockstep", range(100))
    assert end.history[-1]["halvings"] >= 1 and end.history[-1]["rounds"] <= 100


def test_the_history_of_a_file_is_that_of_the_run(tmp_path):
    end = solve("lockstep", 60, callbacks=[CSV(tmp_path / "history.csv")], metrics={"far": lambda x, y: jnp.sum(y)})
    with (tmp_path / "history.csv").open(newline="") as text:
        rows = list(csv.DictReader(text))
    names = ("iteration", "rounds", "far", "halvings")
    assert [[float(row[name]) for name in names] for row in rows] == books(end, *names)
