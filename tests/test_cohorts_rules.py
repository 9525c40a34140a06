"""What holds of every cohort, of whoever answers, and of the mean of their replies: for numbers that hypothesis chooses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedbilevel.algorithms.components.steps import moved_mean
from fedbilevel.cohorts import answered, combine_replies, sample_cohort, stays

CLIENTS = 5
seeds = st.integers(0, 2**31 - 1)
numbers = st.floats(-10, 10, allow_subnormal=False)
weights = arrays.arrays(float, CLIENTS, elements=st.integers(0, 4).map(float)).filter(np.any).map(lambda p: p / p.sum())
flags = arrays.arrays(bool, CLIENTS).filter(np.any)


@given(seeds, st.sampled_from([(5, 1), (5, 3), (5, 5), (40, 7)]))
@settings(max_examples=40, deadline=None)
def test_a_uniform_cohort_is_ascending_distinct_and_of_clients(seed, sizes):
    clients, size = sizes
    cohort = np.asarray(sample_cohort(jax.random.key(seed), clients, size, None))
    assert cohort.shape == (size,) and cohort.dtype == np.int32
    assert (np.diff(cohort) > 0).all() and cohort[0] >= 0 and cohort[-1] < clients


@given(seeds, weights)
@settings(max_examples=40, deadline=None)
def test_a_weighted_cohort_is_ascending_and_of_clients_that_count(seed, p):
    cohort = np.asarray(sample_cohort(jax.random.key(seed), CLIENTS, 3, jnp.asarray(p)))
    assert cohort.shape == (3,) and (np.diff(cohort) >= 0).all()
    assert (p[cohort] > 0).all()


@given(seeds, st.lists(st.integers(0, CLIENTS - 1), min_size=4, max_size=4).map(sorted), st.floats(0, 0.99))
@settings(max_examples=40, deadline=None)
def test_one_always_stays_and_who_was_drawn_twice_answers_once_or_not(seed, cohort, dropout):
    here = np.asarray(stays(jax.random.key(seed), jnp.asarray(cohort, jnp.int32), dropout))
    assert here.any() and (dropout > 0 or here.all())
    assert all(len(set(here[np.equal(cohort, i)])) == 1 for i in cohort)


@given(arrays.arrays(float, (CLIENTS, 2), elements=numbers), weights | st.none(), flags)
@settings(max_examples=50, deadline=None)
def test_replies_are_combined_over_those_present_alone(replies, p, present):
    counting = present if p is None else present & (p > 0)
    assume(counting.any())
    spoilt = np.where(present[:, None], replies, np.nan)
    given = None if p is None else jnp.asarray(p)
    mean = combine_replies("mean", jnp.asarray(spoilt), given, jnp.asarray(present))
    largest = combine_replies("maximum", jnp.asarray(spoilt), given, jnp.asarray(present))
    expected = np.average(replies[present], axis=0, weights=None if p is None else p[present])
    np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(largest, replies[present].max(0))


@given(arrays.arrays(float, (2, CLIENTS), elements=numbers), weights | st.none(), flags)
@settings(max_examples=50, deadline=None)
def test_the_share_moves_a_mean_over_all_clients(kept, p, present):
    """c = sum_i p_i c_i, of whom those present changed theirs by d_i: c + share * mean d is the mean of what is kept now."""
    c, d = kept
    p_each = np.full(CLIENTS, 1 / CLIENTS) if p is None else p
    assume(p_each[present].any())
    given, here = None if p is None else jnp.asarray(p), jnp.asarray(present)
    share = answered(given, jnp.arange(CLIENTS, dtype=jnp.int32), here, CLIENTS)
    moved = moved_mean(jnp.asarray(p_each @ c), share, combine_replies("mean", jnp.asarray(d), given, here))
    np.testing.assert_allclose(moved, p_each @ (c + np.where(present, d, 0)), rtol=0, atol=1e-13)


@given(st.integers(1, CLIENTS), arrays.arrays(bool, CLIENTS))
@settings(max_examples=20, deadline=None)
def test_the_share_of_a_cohort_is_the_part_of_all_that_answered(size, answers):
    cohort, here = jnp.arange(size, dtype=jnp.int32), answers[:size]
    assert answered(None, cohort, None, CLIENTS) == answered(None, size, None, CLIENTS) == size / CLIENTS
    assert float(answered(None, cohort, jnp.asarray(here), CLIENTS)) == here.sum() / CLIENTS
    unequal = jnp.full(CLIENTS, 1 / CLIENTS)
    assert (answered(unequal, cohort, None, CLIENTS) is None) == (size < CLIENTS)
