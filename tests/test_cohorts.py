"""What is drawn, and how it is weighted: cohorts, minibatches, clients that count unequally.

Frequencies are tested by their chi-square statistic with fixed keys; a sampler with a known fault must be seen.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fedbilevel as fb
from fedbilevel.cohorts import client_key, sample_cohort
from helpers.quadratic import flat, inner, outer, quadratic

KEYS = jax.random.split(jax.random.key(5), 20_000)


def fits(numbers, probabilities) -> bool:
    """Whether the numbers 0, 1, ... come as often as they should: within 5 standard deviations of chi-square."""
    seen = np.bincount(numbers, minlength=len(probabilities))
    expected = np.asarray(probabilities) * len(numbers)
    degrees = len(expected) - 1
    return np.sum((seen - expected) ** 2 / expected) < degrees + 5 * np.sqrt(2 * degrees)


# Cohorts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clients", "size"), [(7, 3), (5, 4), (6, 1), (2, 1)])
def test_a_cohort_is_a_uniform_subset_in_order(clients, size):
    cohorts = np.asarray(jax.vmap(lambda key: sample_cohort(key, clients, size, None))(KEYS))
    assert cohorts.shape == (len(KEYS), size) and cohorts.dtype == np.int32
    assert (np.diff(cohorts, axis=1) > 0).all() and cohorts.min() == 0 and cohorts.max() == clients - 1
    subsets, number = np.unique(cohorts, axis=0, return_inverse=True)
    every, number = [1 / len(subsets)] * len(subsets), number.ravel()
    assert len(subsets) == math.comb(clients, size) and fits(number, every)
    assert not fits(np.where((number == 0) & (np.arange(len(number)) % 3 == 0), 1, number), every)


def test_the_whole_federation_is_asked_in_order():
    np.testing.assert_array_equal(sample_cohort(KEYS[0], 6, 6, None), np.arange(6))


def test_with_weights_clients_come_in_proportion():
    p = np.array([0.1, 0.4, 0.2, 0.3])
    cohorts = np.asarray(jax.vmap(lambda key: sample_cohort(key, 4, 2, jnp.asarray(p)))(KEYS))
    assert (np.diff(cohorts, axis=1) >= 0).all()
    pairs = np.array([p[i] * p[j] * (1 + (i != j)) for i in range(4) for j in range(i, 4)])  # independent draws
    place = {(i, j): n for n, (i, j) in enumerate((i, j) for i in range(4) for j in range(i, 4))}
    assert fits(np.array([place[tuple(pair)] for pair in cohorts]), pairs)
    assert not fits(cohorts.ravel(), [0.25] * 4)


# Minibatches ----------------------------------------------------------------------------------------------------------


def rows_of(data, index, key, padded, size=50, draw=0):
    """The rows that client `index` draws, as the simulation sees its data or as a process of its own would."""
    levels = [level.client(index) if padded else level.alone(index) for level in (data.inner, data.outer)]
    client = fb.Client(fb.Problem(inner, outer), tuple(levels), None, client_key(key, index), (True,))
    return tuple(np.asarray(client.batch(level, size, draw).examples["n"]) for level in ("inner", "outer"))


def numbered(counts):
    """Client i's rows are 1000 i, 1000 i + 1, ..."""
    rows = [{"n": 1000 * i + np.arange(n)} for i, n in enumerate(counts)]
    return fb.FederatedData.stack(rows, rows)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_minibatches_depend_on_the_key_and_on_the_count_alone(index):
    counts = (3, 7, 5)
    key, data = KEYS[0], numbered(counts)
    rows = rows_of(data, index, key, padded=True)
    np.testing.assert_array_equal(rows, rows_of(data, index, key, padded=False))
    bigger = numbered([n if i == index else 11 * n for i, n in enumerate(counts)])  # the others' rows do not matter
    np.testing.assert_array_equal(rows, rows_of(bigger, index, key, padded=True))
    for other in ({"key": KEYS[1]}, {"key": key, "draw": 1}):
        assert (rows[0] != rows_of(data, index, padded=True, **other)[0]).any()
    assert (rows[0] != rows[1]).any()  # levels are independent
    assert (rows[0] % 1000 != rows_of(data, (index + 1) % 3, key, padded=True)[0] % 1000).any()


def test_minibatch_rows_are_uniform_over_the_clients_own_rows():
    data = numbered((4, 7, 6))
    rows = rows_of(data, 1, KEYS[2], padded=True, size=40_000)
    for level in rows:
        assert level.min() == 1000 and level.max() == 1006
        assert fits(level - 1000, [1 / 7] * 7)
    assert fits(7 * (rows[0] - 1000) + rows[1] - 1000, [1 / 49] * 49)  # the levels are independent
    assert fits(7 * (rows[0][:-1] - 1000) + rows[0][1:] - 1000, [1 / 49] * 49)  # and so are neighbours
    assert not fits(np.minimum(rows[0] - 1000, 5), [1 / 7] * 7)


# Weights --------------------------------------------------------------------------------------------------------------


def stacked(q, weights, copies=None):
    """Weighted clients; and the same rows pooled in one client, client i's repeated copies[level][i] times."""
    copies = copies or ([1] * len(q.inner), [1] * len(q.outer))
    repeat = lambda rows, times: {k: np.repeat(a, times, axis=0) for k, a in rows.items()}
    pooled = []
    for level, times in zip((q.inner, q.outer), copies, strict=True):
        each = [repeat(rows, n) for rows, n in zip(level, times, strict=True)]
        pooled.append([{k: np.concatenate([rows[k] for rows in each]) for k in each[0]}])
    return fb.FederatedData.stack(q.inner, q.outer, weights=weights), fb.FederatedData.stack(*pooled)


@pytest.mark.parametrize("weights", ["rows", [1.0, 2.0, 3.0]], ids=str)
def test_weighted_clients_are_their_pooled_data(weights):
    q = quadratic(seed=3, clients=3, sizes=((2, 3), (3, 6), (4, 4)))
    copies = None  # weights by rows: every row counts alike, at its own level
    if weights != "rows":  # a client's rows, copied, must weigh 1 : 2 : 3 at both levels
        copies = [6, 8, 9], [4, 4, 9]
        for counts, times in zip(([2, 3, 4], [3, 6, 4]), copies, strict=True):
            shares = np.multiply(counts, times)
            np.testing.assert_allclose(shares / shares.sum(), np.array(weights) / 6)
    data, pooled = stacked(q, weights, copies)
    algorithm = fb.AggITD(inner_rounds=3, inner_lr=0.1, local_steps=1, hessian_lr=0.1, outer_lr=0.05, truncation="full")
    run = lambda data: fb.solve(q.problem, data, algorithm, q.x, q.y, 2, key=KEYS[0])
    alike = fb.FederatedData.stack(q.inner, q.outer, weights=[1, 1, 1])
    one, other, plain = run(data), run(pooled), run(alike)
    np.testing.assert_allclose(flat((one.x, one.y)), flat((other.x, other.y)), rtol=0, atol=1e-12)
    assert np.abs(flat((plain.x, plain.y)) - flat((other.x, other.y))).max() > 1e-3


class Probe(fb.Algorithm):
    """Gradients of both levels at one point, by a fresh and by a drawn cohort, again and again."""

    lr: Any = fb.rate(0.1)

    def step(self, fed, state):
        fresh = fed.average(self.gradients, state.x, state.y)
        drawn = fed.average(self.gradients, state.x, state.y, cohort=fed.draw_cohort())
        numbers = {"fresh": ravel_pytree(fresh)[0], "drawn": ravel_pytree(drawn)[0]}
        return state, {f"{name}{i}": value[i] for name, value in numbers.items() for i in range(len(value))}

    def gradients(self, client, x, y):
        return client.problem.inner_gradient(x, y, client.inner), client.problem.outer_gradients(x, y, client.outer)[1]


def probe(q, data, cohort, iterations):
    """(iterations, numbers) of the fresh and of the drawn cohorts' means."""
    engine = fb.Simulation(cohort=cohort)
    history = fb.solve(q.problem, data, Probe(), q.x, q.y, iterations, key=KEYS[1], engine=engine).history
    names = sorted(name for name in history[-1] if name.startswith("fresh"))
    kinds = ("fresh", "drawn")
    return {kind: np.stack([history.column(name.replace("fresh", kind))[1:] for name in names], 1) for kind in kinds}


SKEWED = quadratic(seed=4, clients=4, sizes=((2, 9), (6, 4), (3, 3), (4, 2)))


def weighted(weights):
    """The weighted data of SKEWED, the weighted mean of its gradients, and their plain mean."""
    p, p_outer = ([2, 6, 3, 4], [9, 4, 3, 2]) if weights == "rows" else (weights, weights)
    each = SKEWED.hessians(SKEWED.t) @ SKEWED.z - SKEWED.targets(SKEWED.t), SKEWED.outer_y(SKEWED.t, SKEWED.z)
    true = np.concatenate([np.average(part, axis=0, weights=w) for part, w in zip(each, (p, p_outer), strict=True)])
    data = fb.FederatedData.stack(SKEWED.inner, SKEWED.outer, weights=weights)
    return data, true, np.concatenate([part.mean(0) for part in each])


@pytest.mark.parametrize("kind", ["fresh", "drawn"])
@pytest.mark.parametrize("weights", ["rows", [1.0, 4.0, 2.0, 3.0]], ids=str)
def test_weighted_means_are_exact_with_everyone(weights, kind):
    data, true, plain = weighted(weights)
    exact = probe(SKEWED, data, None, 1)[kind][0]
    np.testing.assert_allclose(exact, true, rtol=0, atol=1e-12)
    assert np.abs(exact - plain).max() > 1e-2


@pytest.mark.parametrize("weights", ["rows", [1.0, 4.0, 2.0, 3.0]], ids=str)
def test_weighted_means_are_unbiased_with_a_cohort(weights):
    data, true, plain = weighted(weights)
    for sampled in probe(SKEWED, data, 2, 4000).values():
        error = sampled.std(0) / np.sqrt(len(sampled))
        assert (np.abs(sampled.mean(0) - true) < 5 * error).all()
        assert (np.abs(sampled.mean(0) - plain) > 5 * error).any()  # the unweighted mean is told apart


def test_a_plain_cohort_is_unbiased_and_without_replacement():
    q = quadratic(seed=4, clients=4)
    values = q.hessians(q.t) @ q.z - q.targets(q.t)
    for sampled in probe(q, q.data, 2, 4000).values():
        sampled = sampled[:, : values.shape[1]]
        error = sampled.std(0) / np.sqrt(len(sampled))
        assert (np.abs(sampled.mean(0) - values.mean(0)) < 5 * error).all()
        # 2 of 4 without replacement: the variance of one client's value times (1 / 2) (4 - 2) / (4 - 1)
        np.testing.assert_allclose(sampled.var(0), values.var(0) / 3, rtol=0.08)
