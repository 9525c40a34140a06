"""`Problem(features=phi)`: the same numbers as without, phi computed for few rows, and derivatives in x through it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from helpers.featured import (
    BATCHED,
    DATA,
    KEY,
    STEPS,
    STOPPED,
    WITH,
    WITHOUT,
    SameClients,
    X,
    Y,
    batched,
    client,
    inner,
    outer,
    phi,
    whole,
)
from helpers.quadratic import flat

EXACT = 1e-12


OURS: dict[str, Any] = {"truncation": "full", "warm_start_v": True, "one_round": True, "independent_cohorts": True}
ALGORITHMS: dict[str, Callable[..., fb.Algorithm]] = {
    **fb.algorithms.ALGORITHMS,
    "lockstep": lambda inner_rounds, **settings: fb.Lockstep(**settings),
    "aggitd-full": lambda **settings: fb.AggITD(truncation="full", **settings),
    "aggitd-one-round": lambda **settings: fb.AggITD(one_round=True, **settings),
    "aggitd-independent": lambda **settings: fb.AggITD(independent_cohorts=True, **settings),
    "aggitd-ours": lambda **settings: fb.AggITD(**OURS, **settings),
}


def run(problem, algorithm, engine, x=X, **options):
    result = fb.solve(problem, DATA, algorithm, x, Y, 2, key=KEY, engine=engine, **options)
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
    stopped = run(STOPPED, ALGORITHMS["aggitd"](**STEPS), fb.Simulation(), check=False)
    assert np.abs(stopped - expected("aggitd", None, None)).max() > 1e-4


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_cohort_asked_again(batch_size):
    plain = run(WITHOUT, SameClients(batch_size), fb.Simulation(4))
    same(run(WITH, SameClients(batch_size), fb.Simulation(4)), plain)
    if batch_size is None:  # the cohort matters
        assert np.abs(run(WITH, SameClients(again=False), fb.Simulation(4)) - plain).max() > 1e-3


# Derivatives in x -----------------------------------------------------------------------------------------------------


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
