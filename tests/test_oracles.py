"""Oracles that are traced once give what they give untraced, and know features by the very x."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.oracles import traced_once
from fedbilevel.problem import Rows
from fedbilevel.program import freeze

X, Y, V = jnp.array([0.3, -0.5]), jnp.array([0.7, 0.2]), jnp.array([1.0, -2.0])
ROWS = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
DATA = fb.FederatedData.stack([ROWS], [ROWS])


@pytest.fixture
def calls():
    return []


@pytest.fixture
def problem(calls):
    def inner(x, y, row, phi):
        calls.append("inner")
        return 0.5 * jnp.sum((phi * y - row) ** 2)

    def features(x, row):
        calls.append("features")
        return jnp.sin(x) * row

    return fb.Problem(inner, lambda x, y, row: jnp.sum(x * y**2 * row), features=features)


def asked(problem, x, y, rows):
    """Oracles of x alone, of both, and along a direction, some of them twice."""
    once = problem.inner_gradient(x, y, rows), problem.hessian_vector(x, y, V, rows)
    again = problem.inner_gradient(x, 2 * y, rows), problem.cross_vector(x, y, V, rows)
    return once, again, problem.outer_gradients(x, y, rows), problem.inner_value(x, y, rows)


def test_they_give_the_same_and_are_traced_once(problem, calls):
    frozen = freeze(problem, X, Y, DATA)
    weights = jnp.full(4, 0.25)
    given = lambda x: Rows(ROWS, weights, jnp.asarray(4, jnp.int32), features=problem.row_features(x, ROWS), at=x)
    ask = lambda problem: jax.jit(lambda x, y: asked(problem, x, y, given(x)))(X, Y)
    expected = ask(problem)
    calls.clear()
    found = ask(traced_once(frozen))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert calls.count("inner") == 1  # for all of its derivatives
    assert calls.count("features") == 2  # by `given`, which asks the problem itself, and once for `cross_vector`
    ask(traced_once(frozen))
    assert calls.count("inner") == 1


def test_a_problem_that_is_not_frozen_stays_as_it_is(problem):
    assert traced_once(problem) is problem


def test_arguments_may_be_named(problem):
    frozen = freeze(problem, X, Y, DATA)
    rows = DATA.inner.alone(0).all()
    ask = lambda problem: problem.hessian_vector(X, rows=rows, v=V, y=Y)
    np.testing.assert_array_equal(ask(traced_once(frozen)), ask(problem))
