"""Iterations that touch no blocks but those of the clients whom they ask: the same numbers as those that touch all."""

from __future__ import annotations

import dataclasses
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel import owned
from fedbilevel.algorithms import ALGORITHMS
from fedbilevel.engines.base import Carry, Engine, Execution, Record
from fedbilevel.engines.simulated.draws import Draws
from fedbilevel.engines.simulated.programs import chunk
from fedbilevel.engines.simulated.windows import Window, opens
from fedbilevel.engines.simulation import _Simulated
from fedbilevel.pace.automatic import ready
from fedbilevel.protocol import as_leaves
from fedbilevel.watch import observe

M, WIDE, OWN, LONGEST = 60, 3, 2, 5
STEPS = {"inner_lr": 0.05, "hessian_lr": 0.05, "outer_lr": 0.05}
SHORT = {"inner_rounds": 2, "neumann_terms": 2, "local_steps": 2}
KEY = jax.random.key(3)


def inner(x, y, row):
    """Row weights (ragged), a penalty's centre, and a head of each client's own; an x and a body that all have."""
    error = row["a"] @ y["body"] + row["a"][:OWN] @ y["head"] + y["shift"] - row["b"]
    pulled = jnp.sum((y["head"] - x["own"]) ** 2) + jnp.sum((y["body"] - x["all"]) ** 2) + y["shift"] ** 2
    return jax.nn.sigmoid(x["weights"][row["place"]]) * 0.5 * error**2 + 0.5 * pulled


def outer(x, y, row):
    error = row["a"] @ y["body"] + row["a"][:OWN] @ y["head"] + y["shift"] - row["b"]
    return 0.5 * error**2 + 0.1 * (jnp.sum(x["own"] ** 2) + x["all"] ** 2)


PROBLEM = fb.Problem(inner, outer)
LENGTHS = [1 + (7 * i) % LONGEST for i in range(M)]


def rows(weights=None) -> fb.FederatedData:
    draw = np.random.default_rng(0)

    def client(i: int, count: int):
        a = draw.normal(size=(count, WIDE)) + 0.1 * (i % 4)
        return {"a": a, "b": draw.normal(size=count) + 0.1 * i, "place": np.arange(count)}

    return fb.FederatedData.stack(
        [client(i, n) for i, n in enumerate(LENGTHS)], [client(i, 3) for i in range(M)], weights
    )


def start():
    draw = np.random.default_rng(1)
    x = {
        "own": fb.per_client(draw.normal(size=(M, OWN))),
        "all": np.asarray(0.3),
        "weights": fb.per_client([draw.normal(size=n) for n in LENGTHS]),
    }
    y = {
        "head": fb.per_client(draw.normal(size=(M, OWN))),
        "body": draw.normal(size=WIDE),
        "shift": fb.per_client(draw.normal(size=M)),  # a number each
    }
    return x, y


def made(name: str, more: dict) -> fb.Algorithm:
    kind = ALGORITHMS[name]
    fields = {field.name for field in dataclasses.fields(kind)}
    return kind(**{key: value for key, value in (STEPS | SHORT | more).items() if key in fields})


def bound(algorithm: fb.Algorithm, engine: Engine, data: fb.FederatedData):
    """(The algorithm as it runs, the engine's execution, the first carry)."""
    x, y = start()
    algorithm = ready(algorithm, x)
    state = jax.tree.map(jnp.asarray, algorithm.init(x, y))
    execution = engine.bind(PROBLEM, data, algorithm, state, KEY)
    return algorithm, execution, execution.start(algorithm, state)


def asked(execution: Execution) -> int:
    """How many clients an iteration asks, where only asked blocks may be touched."""
    assert isinstance(execution, _Simulated)
    return execution._static().asked


def windowed(algorithm: fb.Algorithm, engine: fb.Simulation, data: fb.FederatedData) -> bool:
    """Whether its iterations touch asked blocks alone."""
    algorithm, execution, carry = bound(algorithm, engine, data)
    return opens(asked(execution), as_leaves(algorithm), carry.state, data.clients)


def ran(algorithm: fb.Algorithm, engine: Engine, data: fb.FederatedData, parts=(4,), limit: float = np.inf):
    """(The carry, the records of the stretches, the clients' states)."""
    algorithm, execution, carry = bound(algorithm, engine, data)
    records = []
    for part in parts:
        carry, record = execution.advance(algorithm, carry, part, limit)
        records.append(record)
    return carry, records, execution.client_states(carry)


@pytest.fixture
def whole(monkeypatch):
    """Runs an algorithm as `ran` does, in iterations that touch all blocks."""
    static = _Simulated._static

    def run(*args, **options):
        with monkeypatch.context() as patched:
            patched.setattr(_Simulated, "_static", lambda self: dataclasses.replace(static(self), usual=False))
            assert not windowed(*args[:3])
            return ran(*args, **options)

    return run


def apart(one, other) -> float:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(
        (float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max(initial=0)) for a, b in pairs), default=0.0
    )


def same(one: tuple[Carry, list[Record], object], other: tuple[Carry, list[Record], object]) -> None:
    assert apart(one[0].state, other[0].state) < 1e-12
    assert apart(one[2], other[2]) < 1e-12
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert (mine.done, mine.rounds, mine.bytes_down, mine.bytes_up, mine.finite) == (
            theirs.done, theirs.rounds, theirs.bytes_down, theirs.bytes_up, theirs.finite
        )  # fmt: skip
        assert apart((mine.info, mine.seen), (theirs.info, theirs.seen)) < 1e-12


TAKE = [name for name, kind in ALGORITHMS.items() if not kind.about.no_blocks and kind.about.asks == "cohort"]
SOON = ("lockstep", "aggitd")
OPTIONS = [
    *[(name, {}) for name in TAKE],
    ("lockstep", {"outer_steps": 2}),
    ("simfbo", {"client_steps": tuple(1 + i % 3 for i in range(M))}),
    ("shrofbo", {"client_steps": tuple(1 + i % 3 for i in range(M))}),
    *[(name, {"truncation": "full"}) for name in ("aggitd", "fednest", "fednest-sgd", "lfednest", "lfednest-svrg")],
    *[(name, {"same_cohort": True, "outer_steps": 2}) for name in ("aggitd", "fednest")],
    *[(name, {"skip_idle_rounds": True, "local_steps": 1}) for name in ("aggitd", "fednest")],
    ("aggitd", {"truncation": "full", "warm_start_v": True}),
    ("aggitd", {"one_round": True}),
    ("aggitd", {"one_round": True, "independent_cohorts": True}),
    ("aggitd", {"independent_cohorts": True}),
    ("fedf2sa", {"penalty_growth": 1.0}),
]
WAYS = [({}, {}), ({"dropout": 0.4}, {"batch_size": 2}), ({"client_batch": 1}, {})]


@pytest.mark.parametrize(
    ("name", "more"), [pytest.param(n, o, marks=[pytest.mark.slow] * (bool(o) or n not in SOON)) for n, o in OPTIONS]
)
def test_iterations_that_touch_asked_blocks_alone_are_those_that_touch_all(name, more, whole):
    data = rows()
    for engine, rest in WAYS:
        case = made(name, more | rest), fb.Simulation(cohort=2, **engine), data
        assert windowed(*case)
        some, all = ran(*case), whole(*case)
        same(some, all)
        if "client_batch" not in engine:
            same(some, ran(case[0], fb.Loopback(cohort=2, **engine), data))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aggitd", "fednest", "lfednest", "fedbio"])
def test_clients_that_are_drawn_twice_have_one_block(name, whole):
    """By weights clients are drawn with replacement: some twice into one cohort."""
    weights = np.linspace(1, 40, M) ** 3
    data = rows(weights / weights.sum())
    case = made(name, {"inner_rounds": 1}), fb.Simulation(cohort=4, dropout=0.3), data
    assert windowed(*case)
    same(ran(*case), whole(*case))
    same(ran(*case), ran(case[0], fb.Loopback(cohort=4, dropout=0.3), data))


def test_stretches_states_on_disk_and_resumed_runs_are_one_run(tmp_path, whole):
    data, algorithm = rows(), made("lockstep", {})
    case = algorithm, fb.Simulation(cohort=3), data
    one = ran(*case, parts=(7,))
    parts, filed = (
        ran(*case, parts=(3, 4)),
        ran(algorithm, fb.Simulation(cohort=3, client_state=tmp_path), data, (3, 4)),
    )
    same(ran(*case, parts=(3, 4)), whole(*case, parts=(3, 4)))
    for other in (parts, filed):
        assert apart((one[0].state, one[2]), (other[0].state, other[2])) == 0
    solved = lambda n, **options: fb.solve(
        PROBLEM, data, algorithm, *start(), n, key=KEY, engine=case[1], check=False, **options
    )
    keeping = lambda: [fb.callbacks.Checkpoint(tmp_path / "run")]
    solved(3, callbacks=keeping())
    on = solved(7, callbacks=keeping(), resume=tmp_path / "run")
    assert apart(solved(7).state, on.state) == 0
    assert apart(on.state, one[0].state) == 0


def test_a_long_run_in_several_chunks_is_one(whole):
    case = made("fedbio", {}), fb.Simulation(cohort=1), rows()
    assert windowed(*case)
    same(ran(*case, parts=(300,)), whole(*case, parts=(300,)))


@pytest.mark.parametrize(
    ("name", "more", "limit", "first"),
    [("lockstep", {"outer_lr": 6.0, "inner_lr": 0.3}, 10.0, 10), ("aggitd", {"outer_lr": 0.01}, 3.0, 0)],
)
def test_a_run_stops_where_it_would(name, more, limit, first, whole):
    """Where a number is beyond the limit, be it of a client that nobody has asked yet."""
    case = made(name, more), fb.Simulation(cohort=2), rows()
    some, all = (run(*case, parts=(60,), limit=limit) for run in (ran, whole))
    assert first <= some[1][0].done == all[1][0].done < (60 if first else 1)
    same(some, all)


def test_what_an_iteration_does_not_touch_is_not_copied():
    """XLA writes the blocks in place only if it knows that they are read before."""
    for name in SOON:
        assert copied(made(name, {}), fb.Simulation(cohort=2), rows()) == []


def copied(algorithm: fb.Algorithm, engine: fb.Simulation, data: fb.FederatedData) -> list[str]:
    """What a compiled program copies in its loops of all clients' blocks."""
    algorithm, execution, carry = bound(algorithm, engine, data)
    assert opens(asked(execution), as_leaves(algorithm), carry.state, data.clients)
    assert isinstance(execution, _Simulated)
    static = execution._static()
    count, one = (lambda n: np.asarray(n, np.int32)), np.asarray(1.0)

    def stretch(*args):
        algorithm, data, states, *others = args
        return chunk(execution.problem, algorithm, static, data, states, *others)

    states, dropout = (carry.state, carry.client_state), np.zeros((), np.float32)
    args = as_leaves(algorithm), execution.data, states, KEY, count(0), count(2), one, dropout
    text = eqx.filter_jit(stretch).lower(*args).compile().compiled.as_text()
    found = lambda part: re.findall(rf".* = f64\[{M}[,\]]\S* copy\(.*", part)
    assert found(text)  # before the loop: what a stretch begins with is not its own
    return found(text[: text.index("\nENTRY ")])


# When --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more", "engine", "does"),
    [
        ("lockstep", {}, {"cohort": 30}, True),
        ("lockstep", {}, {"cohort": 31}, False),  # not few
        ("lockstep", {}, {}, False),
        ("lockstep", {"anderson": 5}, {"cohort": 2}, False),  # keeps earlier points
        ("lockstep", {"outer_lr": "auto"}, {"cohort": 2}, False),  # running means fade
        ("simfbo", {"radius": 1.0}, {"cohort": 2}, False),  # the norm of all v
        ("aggitd", {}, {"cohort": 2}, True),
        ("aggitd", {"inner_rounds": 8}, {"cohort": 2}, False),
        ("aggitd", {"outer_optimizer": "adam:0.1"}, {"cohort": 2}, False),  # moments fade
        ("fedmsa", {}, {"cohort": 2}, False),  # asks everyone
    ],
)
def test_when_asked_blocks_alone_are_touched(name, more, engine, does):
    assert windowed(made(name, more), fb.Simulation(**engine), rows()) is does


def test_without_blocks_there_is_no_window():
    algorithm = made("lockstep", {})
    state = algorithm.init(jnp.zeros(3), jnp.zeros(2))
    _, execution, _ = bound(algorithm, fb.Simulation(cohort=2), rows())
    assert not opens(asked(execution), algorithm, state, M)


class Fading(fb.Algorithm):
    """Moves the blocks of those whom it does not ask too, and says nothing of them."""

    def step(self, fed, state):
        moved = fed.average(self.move, state.x, state.y)
        x = jax.tree.map(lambda old, new: 0.5 * old + new, state.x, moved)
        return fb.State(x, state.y), {"size": sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x))}

    def move(self, client, x, y):
        return jax.tree.map(lambda leaf: 0.1 * leaf, x)


def test_an_algorithm_that_says_nothing_has_all_blocks():
    case = Fading(), fb.Simulation(cohort=2), rows()
    assert not windowed(*case)
    same(ran(*case), ran(case[0], fb.Loopback(cohort=2), case[2]))


class Choosing(Fading):
    """Says that it spares others, and asks whom it likes."""

    @property
    def spares_unasked(self) -> bool:
        return True

    def step(self, fed, state):
        return self._asked(fed, state, jnp.asarray([1, 2], jnp.int32))

    def _asked(self, fed, state, cohort):
        moved = fed.average(self.move, state.x, state.y, cohort=cohort)
        return fb.State(jax.tree.map(jnp.add, state.x, moved), state.y), {}


class Drawing(Choosing):
    """Asks the cohort that was drawn twice."""

    def step(self, fed, state):
        cohort = fed.draw_cohort()
        state = fed.repeat(2, lambda t, state: self._asked(fed, state, cohort)[0], state)
        return self._asked(fed, state, cohort)


def test_an_algorithm_of_ones_own_may_say_that_it_spares_others(whole):
    case = Drawing(), fb.Simulation(cohort=2), rows()
    assert windowed(*case)
    same(ran(*case), whole(*case))
    same(ran(*case), ran(case[0], fb.Loopback(cohort=2), case[2]))
    with pytest.raises(fb.InputError, match="Choosing has spares_unasked, and asks clients of its own choice"):
        ran(Choosing(), *case[1:])


# Its parts ---------------------------------------------------------------------------------------------------------------


def drawn(cohorts: list[list[int]]) -> Draws:
    index = jnp.asarray(cohorts, jnp.int32)
    return Draws(jnp.zeros((len(cohorts), 2), jnp.uint32), index, jnp.zeros((*index.shape, 2), jnp.uint32))


def test_a_client_has_its_first_place_and_what_is_put_back_is_where_it_was():
    window = Window.of(drawn([[1, 4], [0, 4], [4, 6]]), 8)
    assert window.place.tolist() == [2, 0, 6, 6, 1, 6, 5, 6]
    assert window.counts.tolist() == [True, True, True, False, False, True]
    state = {"own": fb.per_client(np.arange(16.0).reshape(8, 2)), "all": np.ones(3)}
    small = window.cut(jax.tree.map(jnp.asarray, state))
    assert small["own"].value[:, 0].tolist() == [2, 8, 0, 8, 8, 12]
    moved = owned.mapped(lambda node: fb.PerClient(node.value.at[window.place[4]].set(-7.0)), small)
    whole, highs = window.put_back(moved, jax.tree.map(jnp.asarray, state), (jnp.arange(8.0),))
    expected = np.arange(16.0).reshape(8, 2)
    expected[4] = -7
    assert np.asarray(whole["own"]).tolist() == expected.tolist()
    assert highs[0].tolist() == [1, 3, 2, 3, 7, 5, 13, 7]


@pytest.mark.parametrize("wide", [0, 1, 5, 32, 33, 100])
def test_the_sketch_of_some_rows_is_that_of_all(wide):
    """The others did not move."""
    draw, those = np.random.default_rng(0), [3, 11, 0, 3]
    moved = np.zeros((12, wide))
    moved[those[:3]] = draw.normal(size=(3, wide))
    tree = lambda own, all: fb.State({"a": jnp.asarray(all), "own": fb.PerClient(jnp.asarray(own))}, jnp.zeros(2))
    common, rows = draw.normal(size=7), moved[those]
    rows[3] = 0  # a client's second place
    window = Window.of(drawn([those]), 12)
    zeros = lambda state: jax.tree.map(jnp.zeros_like, state)
    some, all = tree(rows, common), tree(moved, common)
    seen, expected = window.seen(zeros(some), some, all), observe(zeros(all), all)
    assert apart(seen, expected) < 1e-12
