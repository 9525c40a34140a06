"""The means as the server knows them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from fedbilevel.means.running import LEAST, SAMPLED, Running
from helpers.of_means import of_means, outer_of

EXCHANGES = 4000
LIKE = {"n": jnp.zeros(2), "d": jnp.zeros(())}


def told(number):
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, number), LIKE)


def value(running):
    return float(running.means["d"])


def test_with_everybody_it_is_what_was_said_last():
    running = Running.none(LIKE).begun(told(1.0))
    for number in (3.0, 5.0):
        running = running.renewed(told(number), jnp.asarray(1 - 1e-7), False, True)
        np.testing.assert_array_equal(running.means["n"], [number, number])


@pytest.mark.parametrize(("share", "sampled"), [(0.25, False), (1.0, True), (0.001, False)])
def test_else_it_is_a_mean_of_all_and_then_a_running_one(share, sampled):
    running, a, by_hand = Running.none(LIKE).begun(told(0.0)), share * (SAMPLED if sampled else 1), [0.0]
    for k in range(60):
        running = running.renewed(told(float(k)), share, sampled, True)
        now = max(a, LEAST, 1 / (k + 2))
        by_hand.append(by_hand[-1] + now * (k - by_hand[-1]))
    assert value(running) == pytest.approx(by_hand[-1], rel=1e-12)
    assert int(running.seen) == 61


def test_where_nothing_was_said_it_stays():
    running = Running.none(LIKE).begun(told(2.0)).renewed(told(jnp.nan), 0.5, False, jnp.asarray(False))
    assert value(running) == 2 and int(running.seen) == 1


@pytest.mark.parametrize(("cohort", "most", "alone"), [(5, 0.01, 0.01), (2, 0.01, 0.04)])
def test_the_bias_of_a_cohort_is_small(cohort, most, alone):
    """At x and y that stand still: the mean of F' against F' of the mean, beside that of each reply alone."""
    q = of_means(False, seed=3, sizes=tuple((6, n) for n in range(10, 50, 2)))
    level = q.data.outer
    own = jax.jit(jax.vmap(lambda i: q.problem.means(q.x, q.y, level.client(i).all())))(jnp.arange(20))
    mean = lambda tree: jax.tree.map(lambda leaf: jnp.mean(leaf, 0), tree)
    slope = lambda means: ravel_pytree(jax.grad(outer_of)(means))[0]

    def exchange(running, key):
        reply = mean(jax.tree.map(lambda leaf: leaf[jax.random.permutation(key, 20)[:cohort]], own))
        running = running.renewed(reply, cohort / 20, False, True)
        return running, (slope(running.means), slope(reply))

    start = Running.none(mean(own)).begun(mean(own))
    _, found = jax.jit(lambda start, keys: jax.lax.scan(exchange, start, keys))(
        start, jax.random.split(jax.random.key(0), EXCHANGES)
    )
    true = slope(mean(own))
    ours, theirs = (float(jnp.linalg.norm(jnp.mean(each, 0) - true) / jnp.linalg.norm(true)) for each in found)
    assert ours < most and theirs > alone
