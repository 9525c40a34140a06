"""`Problem(features=phi)`: the same numbers as without, phi computed for few rows, and derivatives in x through it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax.tree
import pytest
from jax.interpreters.partial_eval import dce_jaxpr
from quadratic import flat

import fedbilevel as fb

KEY = jax.random.key(0)
EXACT = 1e-12
SIZES = [(5, 3), (2, 4)]  # (inner, outer) rows of the clients, over and over
CLIENTS = 8
MOST = max(inner for inner, _ in SIZES)


@jax.jit
def body(a, weight):
    """The step that features save; its name is what the tests look for."""
    return a @ weight


def phi(x, e):
    return {"hidden": jnp.tanh(body(e["a"], x["W"])), "shift": x["k"] * e["c"]}


def inner(x, y, e, features):
    residual = features["hidden"] @ y["w"] + y["s"] - e["b"]
    return (
        jax.nn.softplus(residual)
        + 0.25 * residual**2
        + features["shift"] * y["s"]
        + 0.2 * optax.tree.norm(y, squared=True)
    )


def outer(x, y, e):
    return 0.5 * (jnp.tanh(e["a"] @ x["W"]) @ y["w"] + y["s"] - e["b"]) ** 2 + 0.05 * optax.tree.norm(x, squared=True)


def whole(x, y, e):
    """The inner loss with the features inside."""
    return inner(x, y, e, phi(x, e))


def batched(loss):
    def mean(x, y, examples, weights, *features):
        return weights @ jax.vmap(lambda e, *f: loss(x, y, e, *f))(examples, *features)

    return mean


WITH, WITHOUT = fb.Problem(inner, outer, features=phi), fb.Problem(whole, outer)
BATCHED = fb.Problem(batched(inner), batched(outer), batched=True, features=jax.vmap(phi, in_axes=(None, 0)))
STOPPED = fb.Problem(inner, outer, features=lambda x, e: phi(jax.lax.stop_gradient(x), e))  # wrong on purpose


def setup():
    draw = np.random.default_rng(4)

    def rows(i, n):
        return {
            "a": draw.normal(size=(n, 3)) * (0.5 + i / CLIENTS),
            "b": i / 4 + draw.normal(size=n),
            "c": draw.normal(size=n),
        }

    sizes = [SIZES[i % len(SIZES)] for i in range(CLIENTS)]
    data = fb.FederatedData.stack(
        [rows(i, n) for i, (n, _) in enumerate(sizes)], [rows(i, n) for i, (_, n) in enumerate(sizes)]
    )
    x = {"W": jnp.asarray(draw.normal(size=(3, 3))), "k": jnp.asarray(0.4)}
    return data, x, {"w": jnp.asarray(draw.normal(size=3)), "s": jnp.asarray(0.3)}


DATA, X, Y = setup()
STEPS: dict[str, Any] = {"inner_rounds": 2, "inner_lr": 0.1, "local_steps": 3, "hessian_lr": 0.1, "outer_lr": 0.1}
OURS: dict[str, Any] = {"truncation": "full", "warm_start_v": True, "one_round": True, "independent_cohorts": True}
ALGORITHMS: dict[str, Callable[..., fb.Algorithm]] = {
    **fb.algorithms.ALGORITHMS,
    "lockstep": lambda inner_rounds, **settings: fb.Lockstep(**settings),
    "aggitd-full": lambda **settings: fb.AggITD(truncation="full", **settings),
    "aggitd-one-round": lambda **settings: fb.AggITD(one_round=True, **settings),
    "aggitd-independent": lambda **settings: fb.AggITD(independent_cohorts=True, **settings),
    "aggitd-ours": lambda **settings: fb.AggITD(**OURS, **settings),
}


def run(problem, algorithm, engine, x=X):
    result = fb.solve(problem, DATA, algorithm, x, Y, 2, key=KEY, engine=engine)
    return flat(eqx.filter((result.x, result.y), eqx.is_inexact_array))


def same(one, other):
    np.testing.assert_allclose(one, other, rtol=0, atol=EXACT * max(1.0, np.abs(other).max()))


# The same numbers -----------------------------------------------------------------------------------------------------


@functools.cache
def expected(name, batch_size, cohort):
    """The run without features."""
    return run(WITHOUT, ALGORITHMS[name](**STEPS, batch_size=batch_size), fb.Simulation(cohort))


PATHS = [  # every algorithm; all rows or some, of everyone or a cohort; one after the other, in pieces, all at once
    ("aggitd", WITH, None, fb.Simulation()),
    ("aggitd-full", WITH, 2, fb.Simulation(cohort=4)),
    ("aggitd-one-round", WITH, None, fb.Simulation(cohort=4)),
    ("aggitd-independent", WITH, 2, fb.Simulation(cohort=4)),
    ("aggitd-ours", WITH, None, fb.Simulation(client_batch=3)),
    ("aggitd-ours", BATCHED, None, fb.Simulation()),
    ("aggitd-full", BATCHED, 2, fb.Loopback(cohort=4, shuffle=2)),
    ("fednest", WITH, 2, fb.Simulation()),
    ("fednest-sgd", WITH, 2, fb.Simulation(cohort=4)),
    ("lfednest", WITH, 2, fb.Simulation(cohort=4)),
    ("lockstep", WITH, 2, fb.Simulation(cohort=4)),
    ("lfednest-svrg", WITH, None, fb.Simulation()),
]


OFTEN = ("aggitd", "aggitd-ours", "fednest", "lockstep")  # the others among the slow tests: each compiles two programs


@pytest.mark.parametrize(
    ("name", "problem", "batch_size", "engine"),
    [pytest.param(*path, marks=() if path[0] in OFTEN else pytest.mark.slow) for path in PATHS],
)
def test_features_change_no_number(name, problem, batch_size, engine):
    algorithm = ALGORITHMS[name](**STEPS, batch_size=batch_size)
    same(run(problem, algorithm, engine), expected(name, batch_size, engine.cohort))


def test_the_comparison_sees_a_derivative_that_is_missing():
    assert (
        np.abs(run(STOPPED, ALGORITHMS["aggitd"](**STEPS), fb.Simulation()) - expected("aggitd", None, None)).max()
        > 1e-4
    )


class SameClients(fb.Algorithm):
    """A user's own: a cohort drawn for the iteration, asked in every round, in the loop and after it."""

    batch_size: int | None = fb.count(None)
    again: bool = fb.option(True)

    def step(self, fed, state):
        x, clients = state.x, fed.draw_cohort() if self.again else None
        turn = lambda t, y: fed.average(self.descend, x, y, cohort=clients)
        y = fed.repeat(3, turn, state.y)
        h = fed.average(self.cross, x, y, cohort=clients)
        return fb.State(optax.tree.add_scale(x, -0.1, h), fed.average(self.descend, x, y, cohort=clients)), {}

    def descend(self, client, x, y):
        rows = client.batches("inner", self.batch_size, 3, at=x)
        step = lambda s, y: optax.tree.add_scale(y, -0.1, client.problem.inner_gradient(x, y, rows(s)))
        return jax.lax.fori_loop(0, 3, step, y)

    def cross(self, client, x, y):
        return client.problem.cross_vector(x, y, y, client.batch("inner", self.batch_size))


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_cohort_asked_again(batch_size):
    plain = run(WITHOUT, SameClients(batch_size), fb.Simulation(4))
    same(run(WITH, SameClients(batch_size), fb.Simulation(4)), plain)
    if batch_size is None:  # the cohort matters
        assert np.abs(run(WITH, SameClients(again=False), fb.Simulation(4)) - plain).max() > 1e-3


# Derivatives in x -----------------------------------------------------------------------------------------------------


def client(index=0, problem=WITH):
    return fb.Client(problem, (DATA.inner.alone(index), DATA.outer.alone(index)), None, KEY, (True, True))


def test_derivatives_in_x_go_through_features_that_are_already_computed(monkeypatch):
    rows = client().batches("inner", None, 2, at=X)(0)
    assert rows.computed_at(X) and not rows.computed_at(jax.tree.map(jnp.copy, X)) and rows.features is not None
    plain = client().inner
    cross = lambda problem, rows: flat(problem.cross_vector(X, Y, Y, rows))
    true = cross(WITHOUT, plain)
    same(cross(WITH, rows), true)
    same(flat(WITH.inner_gradient(X, Y, rows)), flat(WITHOUT.inner_gradient(X, Y, plain)))
    assert np.abs(cross(STOPPED, plain) - true).max() > 0.01
    moved = jax.tree.map(lambda leaf: leaf + 0.1, X)  # another x: the features that came with the rows do not count
    same(flat(WITH.inner_gradient(moved, Y, rows)), flat(WITHOUT.inner_gradient(moved, Y, plain)))
    monkeypatch.setattr(fb.Rows, "computed_at", lambda self, x: self.features is not None)
    assert np.abs(cross(WITH, rows) - true).max() > 0.01
    assert (
        np.abs(flat(WITH.inner_gradient(moved, Y, rows)) - flat(WITHOUT.inner_gradient(moved, Y, plain))).max() > 0.01
    )


def test_the_hypergradient_goes_through_the_features():
    true = flat(fb.reference.hypergradient(WITHOUT, DATA, X, Y))
    same(flat(fb.reference.hypergradient(WITH, DATA, X, Y)), true)
    assert np.abs(flat(fb.reference.hypergradient(STOPPED, DATA, X, Y)) - true).max() > 1e-3


def test_check_problem_sees_features_that_hide_x():
    assert fb.testing.check_problem(WITH, DATA, X, Y).passed
    with pytest.raises(fb.testing.CheckFailed, match="FAILED client 0: cross_vector"):
        fb.testing.check_problem(STOPPED, DATA, X, Y)


# How often phi is computed --------------------------------------------------------------------------------------------


def rows_computed(jaxpr) -> int:
    """The rows that `body` is computed for: over the turns of a loop, the dearest branch of a choice."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.params.get("name") == "body":
            total += eqn.invars[0].aval.shape[0]
            continue
        assert eqn.primitive.name != "while", "a loop of unknown length"
        times = eqn.params.get("length", 1)
        inside = [rows_computed(sub) for value in eqn.params.values() for sub in jaxprs_in(value)]
        total += times * (max(inside, default=0) if eqn.primitive.name == "cond" else sum(inside))
    return total


def jaxprs_in(value):
    for each in value if isinstance(value, tuple | list) else (value,):
        each = getattr(each, "jaxpr", each)
        if hasattr(each, "eqns"):
            yield each


def computed_by(method, *message, problem=WITH, index=0) -> int:
    """The same for one client method, without what its reply does not need."""
    asked = client(index, problem)
    made = jax.make_jaxpr(lambda *message: jax.tree.leaves(method(asked, *message)))(*message)
    return rows_computed(dce_jaxpr(made.jaxpr, [True] * len(made.jaxpr.outvars))[0])


BUSY = {**STEPS, "local_steps": 7}
ROW_COUNTS = [  # (algorithm, method, what is sent after x and y, draws on y at one x)
    (fb.AggITD, "lower", (Y,), 6),  # the first step needs no rows
    (fb.LFedNest, "lower", (), 7),
    (fb.LFedNest, "local_hypergradient", (None,), 4),
    (fb.AggITD, "anchor", (fb.When(jnp.asarray(True), Y), None), 2),
    (fb.AggITD, "vector_apart", (), 1),
    (fb.AggITD, "largest_curvature", (), 1),
    (fb.FedNest, "factor", (Y, None), 1),
]


@pytest.mark.parametrize("batch_size", [1, 2, None])
@pytest.mark.parametrize(("kind", "name", "rest", "draws"), ROW_COUNTS, ids=[name for _, name, *_ in ROW_COUNTS])
def test_an_exchange_computes_no_row_twice(kind, name, rest, draws, batch_size):
    series = {} if kind is fb.AggITD else {"neumann_terms": 4}
    algorithm = kind(**BUSY, **series, truncation="full", batch_size=batch_size)
    method, message = getattr(algorithm, name), (X, Y, *rest)
    if name == "vector_apart":
        present = jnp.asarray(True)
        method = lambda client, x, y: algorithm.vector_apart(
            client, fb.When(present, (x, y)), fb.When(present, Y), None
        )
    count = SIZES[0][0]
    steps = draws * (batch_size or count)
    # the derivative in x goes through phi, forwards and backwards, on one draw's rows
    through = 2 * (batch_size or count) if name == "local_hypergradient" else 0
    assert computed_by(method, *message) <= min(count, steps) + through
    without = computed_by(method, *message, problem=WITHOUT)
    assert without >= steps + through
    if draws > 2 and (batch_size is None or steps > count):
        assert without > min(count, steps) + through


def test_the_one_round_turn_computes_each_row_once():
    algorithm = fb.AggITD(**BUSY, one_round=True)
    own = dataclasses.replace(client(), state=Y)
    sent = (Y, fb.When(jnp.asarray(True), Y), None)
    made = jax.make_jaxpr(lambda x, y: jax.tree.leaves(algorithm.corrected_anchor(own, x, y, *sent)))(X, Y)
    assert rows_computed(dce_jaxpr(made.jaxpr, [True] * len(made.jaxpr.outvars))[0]) == SIZES[0][0]


def counting(problem, algorithm, engine) -> int:
    """How often phi is computed for a row in one iteration, while it runs."""
    seen = []

    def counted(x, e):
        jax.debug.callback(lambda _: seen.append(1), e["b"])
        return phi(x, e)

    if problem is WITH:
        other = fb.Problem(inner, outer, features=counted)
    else:
        other = fb.Problem(lambda x, y, e: inner(x, y, e, counted(x, e)), outer)
    fb.solve(other, DATA, algorithm, X, Y, 1, key=KEY, engine=engine)
    jax.effects_barrier()
    return len(seen)


def test_everyone_computes_each_row_once_an_iteration():
    algorithm = fb.AggITD(**STEPS)
    padded = CLIENTS * MOST
    # once for every gradient and Hessian product in y; once more to differentiate it in x
    assert counting(WITH, algorithm, fb.Simulation()) == 2 * padded
    assert counting(WITHOUT, algorithm, fb.Simulation()) > 2 * 2 * padded


def test_a_cohort_asked_again_computes_each_row_once():
    padded = 4 * MOST
    assert counting(WITH, SameClients(), fb.Simulation(4)) == 2 * padded
    assert counting(WITH, SameClients(again=False), fb.Simulation(4)) == (3 + 1 + 1) * padded


# Other shapes of x, and what is refused -------------------------------------------------------------------------------


class Body(eqx.Module):
    weight: jax.Array
    activation: Callable

    def __call__(self, a):
        return self.activation(a @ self.weight)


@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.softplus])
def test_x_may_be_a_module_with_leaves_that_are_no_arrays(activation):
    x, algorithm = Body(X["W"], activation), fb.AggITD(**STEPS)
    loss = lambda x, y, e, features: (
        0.5 * (features @ y["w"] + y["s"] - e["b"]) ** 2 + 0.1 * (y["w"] @ y["w"] + y["s"] ** 2)
    )
    judge = lambda x, y, e: loss(x, y, e, x(e["a"]))
    modular = fb.Problem(loss, judge, features=lambda x, e: x(e["a"]))
    ends = [run(p, algorithm, fb.Simulation(), x) for p in (modular, fb.Problem(judge, judge))]
    same(*ends)
    other = run(modular, algorithm, fb.Simulation(), Body(X["W"], jax.nn.relu))
    assert np.abs(other - ends[0]).max() > 1e-3


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        (lambda: fb.Problem(inner, outer, features=3), "takes a function .* not 3"),  # pyright: ignore
        (lambda: fb.Problem(inner, outer, features=lambda x, e: e["a"] @ e["c"]), "the features function failed on"),
        (lambda: fb.Problem(inner, outer, features=lambda x: x), "the features function failed on .*TypeError"),
        (lambda: fb.Problem(inner, outer, features=lambda x, e: None), "must return a pytree of arrays"),
        (lambda: fb.Problem(whole, outer, features=phi), "the inner loss failed on .*TypeError"),
        (
            lambda: fb.Problem(
                batched(inner),
                batched(outer),
                True,
                lambda x, rows: jax.tree.map(lambda a: a.mean(0), BATCHED.features(x, rows)),
            ),
            "rows first",
        ),
    ],
    ids=["no function", "fails", "signature", "nothing", "loss takes none", "not by rows"],
)
def test_bad_features_are_refused_in_a_sentence(problem, sentence):
    with pytest.raises(fb.InputError, match=sentence) as error:
        fb.solve(problem(), DATA, fb.AggITD(**STEPS), X, Y, 1, key=KEY)
    assert "\n" not in str(error.value)


def test_batches_refuse_another_level():
    with pytest.raises(fb.InputError, match="level"):
        client().batches("middle", None, 1, at=X)  # pyright: ignore[reportArgumentType]
