"""Client methods of modules nested in an algorithm: known by their path, and configured as they are there."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.algorithm import Component, component
from helpers.logistic import CLIENTS, PROBLEM, X, Y


class Steps(Component):
    """Plain gradient steps on y."""

    lr: float = fb.rate(0.1)
    times: int = fb.count(1)

    def move(self, client, x, y):
        return jax.lax.fori_loop(
            0, self.times, lambda s, y: y - self.lr * client.problem.inner_gradient(x, y, client.inner), y
        )

    def _hidden(self, client, y):
        return y


class Pair(eqx.Module):
    """Two of a kind, one level further down; no component of ours."""

    slow: Steps
    fast: Steps


class Nested(fb.Algorithm):
    """Moves y by one of a pair and then by the other."""

    pair: Pair
    many: Steps
    lr: float = fb.rate(0.05)

    @component
    def own(self) -> Steps:
        return Steps(self.lr)

    def step(self, fed, state):
        y = state.y
        for steps in (self.pair.slow, self.pair.fast, self.many, self.own):
            y = fed.average(steps.move, state.x, y)
        return fb.State(state.x, y), {}


NESTED = Nested(Pair(Steps(0.01), Steps(0.2)), Steps(0.1, 3))


def gradient(y):
    rows = [
        PROBLEM.inner_gradient(jnp.asarray(X), jnp.asarray(y), CLIENTS.data.inner.client(i).all()) for i in range(3)
    ]
    return np.array(rows)


def expected(y, lr, times=1):
    ends = []
    for i in range(len(CLIENTS.inner)):
        own = np.asarray(y)
        for _ in range(times):
            own = own - lr * gradient(own)[i]
        ends.append(own)
    return np.mean(ends, axis=0)


def test_exchanges_are_named_by_the_path():
    found = fb.protocol(NESTED, PROBLEM, CLIENTS.data, jnp.asarray(X), jnp.asarray(Y)).exchanges
    assert [each.name for each in found] == ["pair.slow.move", "pair.fast.move", "many.move", "own.move"]


@pytest.mark.parametrize("engine", [fb.Simulation(), fb.Loopback()], ids=lambda engine: type(engine).__name__)
@pytest.mark.parametrize("options", [{}, {"lr": 0.3}], ids=["plain", "replaced"])
def test_each_is_configured_as_it_is_there(engine, options):
    algorithm = dataclasses.replace(NESTED, **options)
    end = fb.solve(
        PROBLEM,
        CLIENTS.data,
        algorithm,
        jnp.asarray(X),
        jnp.asarray(Y),
        1,
        key=jax.random.key(0),
        engine=engine,
        check=False,
    )
    y = np.asarray(Y)
    for lr, times in ((0.01, 1), (0.2, 1), (0.1, 3), (algorithm.lr, 1)):
        y = expected(y, lr, times)
    np.testing.assert_allclose(end.y, y, rtol=0, atol=1e-12)


class Stranger(Nested):
    """Asks for a method of a module that is not in it."""

    def step(self, fed, state):
        return fb.State(state.x, fed.average(Elsewhere().move, state.x, state.y)), {}


class Elsewhere(eqx.Module):
    def move(self, client, x, y):
        return y


class Private(Nested):
    """Asks for a private method."""

    def step(self, fed, state):
        return fb.State(state.x, fed.average(self.many._hidden, state.y)), {}


@pytest.mark.parametrize(
    ("kind", "sentence"), [(Stranger, "fed.average takes a method of Stranger"), (Private, "'_hidden' is private")]
)
def test_what_is_no_method_of_a_module_in_it_is_refused(kind, sentence):
    algorithm = kind(NESTED.pair, NESTED.many)
    with pytest.raises(fb.InputError, match=sentence):
        fb.protocol(algorithm, PROBLEM, CLIENTS.data, jnp.asarray(X), jnp.asarray(Y))
