"""A run whose x was never let go says so."""

from __future__ import annotations

import dataclasses
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.diagnosis.still import tell_still
from fedbilevel.engines.base import Carry, Record
from fedbilevel.pace.automatic import ready

FLAT = jnp.asarray([1.0, 1e-4])  # y lags in the direction of x for thousands of rounds
PROBLEM = fb.Problem(
    lambda x, y, row: 0.5 * jnp.sum(FLAT * (y - x * jnp.asarray([0.0, 1.0]) - row) ** 2),
    lambda x, y, row: 0.5 * jnp.sum((y - 1) ** 2),
)
ROWS = [jnp.asarray([[0.0, 3.0], [0.0, 4.0]]), jnp.asarray([[0.0, 5.0]])]
DATA = fb.FederatedData.stack(ROWS, ROWS)
X, Y = jnp.zeros(1), jnp.zeros(2)


def solved(iterations, algorithm, engine=None):
    return fb.solve(PROBLEM, DATA, algorithm, X, Y, iterations, key=jax.random.key(0), engine=engine)


@pytest.mark.parametrize("engine", [fb.Simulation(), fb.Loopback()], ids=["Simulation", "Loopback"])
def test_it_is_told_from_thirty_iterations_on(engine):
    solved(29, fb.Lockstep(), engine)  # a warning would be an error here
    said = r'x is where it started, after 30 iterations of Lockstep.*outer_lr="auto".*local_steps \(now 5\)'
    with pytest.warns(fb.errors.FedbilevelWarning, match=said):
        result = solved(30, fb.Lockstep(), engine)
    assert (result.x == X).all()
    solved(30, fb.Lockstep(outer_lr=0.01), engine)  # a number moves x


def test_that_the_run_went_back_is_told_too():
    auto = ready(fb.Lockstep(), X)
    state = auto.init(X, Y)
    gone_back = dataclasses.replace(state.memory, halvings=jnp.asarray(2, jnp.int32))
    with pytest.warns(fb.errors.FedbilevelWarning, match="has gone back 2 times and takes shorter steps"):
        tell_still(auto, Carry(dataclasses.replace(state, memory=gone_back), None, 40), last(0.5))
    moved = dataclasses.replace(state.pace, moves=jnp.asarray(1, jnp.int32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tell_still(auto, Carry(dataclasses.replace(state, pace=moved), None, 40), last(0.5))
        tell_still(auto, Carry(state, None, 40), last(0.0))  # x has nowhere to go


def last(length):
    """The record of an iteration that found a hypergradient of this length."""
    return Record(1, [1], [0], [0], SimpleNamespace(hypergradient_norm=np.asarray([length])), True, 0.0)
