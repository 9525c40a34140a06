"""What `fed` offers a server program, on both engines: loops, draws, cohorts, conditional parts; and what it refuses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax.tree
import pytest

import fedbilevel as fb
from helpers import cases
from helpers.quadratic import flat, quadratic

KEY = jax.random.key(0)
ENGINES = (fb.Simulation, fb.Loopback)
both = pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)


class Descent(fb.Algorithm):
    """One step along the mean gradient of the lower level; what subclasses change."""

    lr: Any = fb.rate(0.01)

    def step(self, fed, state):
        g = fed.average(self.gradient, state.x, state.y)
        return fb.State(state.x, optax.tree.add_scale(state.y, -self.lr, g)), {}

    def gradient(self, client, x, y):
        return client.problem.inner_gradient(x, y, client.inner)


# Loops, draws and cohorts ---------------------------------------------------------------------------------------------


MOST = 6


class Everything(fb.Algorithm):
    """Halves y until it is below one, then, a drawn number of times, asks cohorts for their clients' numbers."""

    def step(self, fed, state):
        small = lambda y: jnp.max(jnp.abs(y)) < 1
        y = fed.until(small, lambda t, y: fed.average(self.half, y), state.y, most=20)
        drawn = fed.randint(0, MOST + 1)

        def ask(t, seen):
            same = fed.draw_cohort()
            more = fed.when(t > 1, jnp.ones(()))
            return tuple(fed.average(self.number, more, cohort=cohort) for cohort in (same, same, None))

        first, again, fresh = fed.repeat(drawn, ask, (jnp.zeros(()),) * 3, most=MOST)
        return fb.State(state.x, y), {"drawn": drawn, "first": first, "again": again, "fresh": fresh}

    def half(self, client, y):
        return optax.tree.scale(0.5, y)

    def number(self, client, more):
        return jnp.mean(client.inner.examples["number"]) + jnp.where(more.present, more.value, 0)


@pytest.fixture(scope="module")
def everything():
    """Client i's rows hold 100^i, so that a mean of two tells who was asked; the run on both engines."""
    rows = [{"number": np.full(1 + i % 2, 100.0**i)} for i in range(4)]
    loss = lambda x, y, e: 0.5 * (x**2 + jnp.sum(y**2)) + 0 * e["number"]
    task = fb.Problem(loss, loss), fb.FederatedData.stack(rows, rows)
    start = jnp.zeros(()), jnp.asarray([100.0, 3.0])
    return [
        fb.solve(*task, Everything(), *start, 40, key=jax.random.key(3), engine=engine(cohort=2)) for engine in ENGINES
    ]


def test_loops_and_draws_work_on_both_engines(everything):
    one, other = everything
    np.testing.assert_array_equal(one.y, other.y)
    for column in ("rounds", "bytes_down", "bytes_up", "drawn", "first", "again", "fresh"):
        np.testing.assert_array_equal(one.history.column(column), other.history.column(column))

    np.testing.assert_array_equal(one.y, np.array([100.0, 3.0]) / 2**7)  # 100 / 2^7 is the first below one
    drawn = one.history.column("drawn")[1:].astype(int)
    assert set(drawn) == set(range(MOST + 1))
    halvings = np.eye(40, dtype=int)[0] * 7  # in the first iteration only
    np.testing.assert_array_equal(np.diff(one.history.column("rounds")), halvings + 3 * drawn)
    down = 2 * 8 * (2 * halvings + 3 * np.maximum(drawn - 2, 0))  # cohort * float64 * (y, or the part from t = 2 on)
    np.testing.assert_array_equal(np.diff(one.history.column("bytes_down")), down)
    assert one.protocol.kind == "bound" and one.protocol.rounds == one.protocol.rounds_most == 20 + 3 * MOST


def test_a_drawn_cohort_is_asked_again_and_another_is_fresh(everything):
    history = everything[0].history
    first, again, fresh, drawn = (history.column(name)[1:] for name in ("first", "again", "fresh", "drawn"))
    pairs = {(100.0**i + 100.0**j) / 2 for i in range(4) for j in range(i)}
    late = drawn > 2  # the part that travels from t = 2 on adds one
    asked = np.concatenate([(numbers - late)[drawn > 0] for numbers in (first, fresh)])
    assert set(asked) == pairs  # without replacement, and every pair comes up
    np.testing.assert_array_equal(first, again)
    assert (fresh != first).any()


class Misused(Everything):
    """More rounds than it said, or a cohort of another size than the engine's."""

    how: str = fb.option("rounds")

    def step(self, fed, state):
        if self.how == "rounds":
            y = fed.repeat(jnp.asarray(7), lambda t, y: fed.average(self.half, y), state.y, most=5)
        else:
            y = fed.average(self.half, state.y, cohort=jnp.arange(3, dtype=jnp.int32))
        return fb.State(state.x, y), {}


@pytest.mark.parametrize("how", ["rounds", "cohort"])
def test_what_is_counted_never_exceeds_the_protocol_on_any_engine(how):
    """Whether that is refused or cut short: engines must not differ, and no ledger be wrong."""
    q, outcomes = cases.problem(), []
    for engine in ENGINES:
        try:
            run = fb.solve(q.problem, q.data, Misused(how=how), q.x, q.y, 1, key=KEY, engine=engine(cohort=2))
            row, most = run.history[-1], run.protocol
            outcomes.append((row["rounds"], row["bytes_down"], *flat(run.y)))
            assert row["rounds"] <= most.rounds_most and row["bytes_down"] <= most.bytes_down_most
        except fb.InputError as refusal:
            outcomes.append(str(refusal))
    assert outcomes[0] == (outcomes[1] if isinstance(outcomes[1], str) else pytest.approx(outcomes[1], rel=1e-12))


class Keyed(fb.State):
    key: Any


class Oddities(Descent):
    """A numpy number of rounds, whole numbers and truth values as replies, a random key in the state."""

    what: str = fb.option("rounds")

    def init(self, x, y):
        return Keyed(x, y, KEY if self.what == "key" else jnp.zeros(()))

    def step(self, fed, state):
        if self.what == "rounds":
            fed.repeat(np.int64(2), lambda t, y: fed.average(self.same, y), state.y)
        many = fed.average(self.many, state.y)
        if self.what == "replies":
            count = fed.repeat(2, lambda t, n: fed.average(self.count, state.y), jnp.zeros(()))
            many = many + count / 1000
        key = jax.random.split(state.key)[0] if self.what == "key" else state.key
        return Keyed(state.x, state.y, key), {"many": many}

    def same(self, client, y):
        return y

    def count(self, client, y):
        return client.inner.count

    def many(self, client, y):
        return client.inner.count > 2


@both
@pytest.mark.parametrize("what", ["rounds", "replies", "key"])
def test_what_a_program_may_well_do_works(engine, what):
    q = cases.problem()  # four clients of five and four of two inner rows
    run = fb.solve(q.problem, q.data, Oddities(what=what), q.x, q.y, 2, key=KEY, engine=engine())
    assert run.history[-1]["many"] == 0.5 + (what == "replies") * 3.5 / 1000
    assert run.history[-1]["rounds"] == 2 * (1 + 2 * (what != "key"))
    if what == "key":
        twice = jax.random.split(jax.random.split(KEY)[0])[0]
        np.testing.assert_array_equal(jax.random.key_data(run.state.key), jax.random.key_data(twice))


# Refusals and failures ------------------------------------------------------------------------------------------------


class Forgetful(Descent):
    def gradient(self, client, x, y):
        return fb.Reply(client.problem.inner_gradient(x, y, client.inner), y)


@both
def test_a_client_state_that_was_not_declared_is_refused(engine):
    q = cases.problem()
    with pytest.raises(fb.InputError, match="client_init"):
        fb.solve(q.problem, q.data, Forgetful(), q.x, q.y, 1, key=KEY, engine=engine())


class Nested(Descent):
    inside: str = fb.option("scan")

    def step(self, fed, state):
        ask = lambda y: fed.average(self.gradient, state.x, y)
        twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state.y)
        run = {
            "scan": lambda: jax.lax.scan(lambda y, _: (ask(y), None), state.y, None, length=2),
            "fori_loop": lambda: fed.repeat(2, lambda t, y: jax.lax.fori_loop(0, 2, lambda _, y: ask(y), y), state.y),
            "vmap": lambda: jax.vmap(ask)(twice),
            "jit": lambda: jax.jit(ask)(state.y),
            "cond": lambda: jax.lax.cond(True, ask, lambda y: y, state.y),
        }
        run[self.inside]()
        return state, {}


@both
@pytest.mark.parametrize("inside", ["scan", "fori_loop", "vmap", "jit", "cond"])
def test_fed_within_a_jax_transformation_is_refused(engine, inside):
    q = cases.problem()
    with pytest.raises(fb.InputError, match=r"use fed\.repeat"):
        fb.solve(q.problem, q.data, Nested(inside=inside), q.x, q.y, 1, key=KEY, engine=engine())


class Failing(Descent):
    """A client with an odd number of rows fails (the protocol's trace sees an even one)."""

    def gradient(self, client, x, y):
        client.inner.examples["c"].reshape(2, -1, 4)
        return client.problem.inner_gradient(x, y, client.inner)


@pytest.mark.parametrize("jit", [True, False])
def test_a_failing_client_is_named_with_its_method_and_shapes(jit):
    q = quadratic(clients=4, sizes=((4, 2), (2, 2), (3, 2)))
    with pytest.raises(fb.ClientError) as failure:
        fb.solve(q.problem, q.data, Failing(), q.x, q.y, 1, key=KEY, engine=fb.Loopback(jit=jit))
    for part in ("client 2 failed in Failing.gradient", "'w': f64[3]", "'u': f64[4]", "3 inner and 2 outer rows"):
        assert part in str(failure.value)
