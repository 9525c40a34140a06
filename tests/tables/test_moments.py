"""Moments of several clients are those of the pooled numbers, wherever these lie and however they are dealt out."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbilevel.tables.moments import Moments, merged


def exact(values):
    """(mean, centred) in fractions."""
    numbers = [Fraction(float(v)) for v in values]
    mean = sum(numbers) / len(numbers)
    return mean, sum((v - mean) ** 2 for v in numbers)


def parts(values, seed, clients=5):
    ends = np.sort(np.random.default_rng(seed).integers(0, len(values) + 1, clients - 1))
    return [Moments.of(part) for part in np.split(values, ends)]


@pytest.mark.parametrize(("where", "size"), [(0, 1), (1e9, 1), (-1e9, 1e-3), (1e12, 1), (1e-6, 1e-9)])
def test_columns_anywhere_keep_their_deviation(where, size):
    values = where + size * np.random.default_rng(0).normal(size=4000)
    mean, centred = exact(values)
    for own in (Moments.of(values), merged(parts(values, 1)), merged(parts(values, 2, 400))):
        assert own.count == 4000
        assert abs(Fraction(own.mean) + Fraction(own.rest) - mean) <= 1e-10 * size
        assert abs(own.centred / float(centred) - 1) < 1e-10
        assert abs(own.deviation / np.sqrt(float(centred) / 4000) - 1) < 1e-10


def test_without_the_rest_of_a_mean_it_would_not_be_so():
    values = 1e9 + np.random.default_rng(0).normal(size=4000)
    short = merged([Moments(own.count, own.mean, 0.0, own.centred) for own in parts(values, 2, 400)])
    assert abs(short.centred / float(exact(values)[1]) - 1) > 1e-10


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.integers(0, 9))
def test_any_numbers_dealt_out_anyhow(values, seed):
    values = np.array(values)
    own, (mean, centred) = merged(parts(values, seed)), exact(values)
    size = max(float(np.abs(values).max()), 1e-100)  # squares of smaller ones are 0
    assert own.count == len(values)
    assert abs(Fraction(own.mean) + Fraction(own.rest) - mean) <= Fraction(size) * Fraction(1e-15)
    assert abs(Fraction(own.centred) - centred) <= Fraction(size) ** 2 * Fraction(1e-13)


def test_what_is_constant_has_no_deviation():
    assert merged([Moments.of(np.full(3, 0.1)), Moments.of(np.full(70, 0.1)), Moments.of(np.zeros(0))]).deviation == 0
    assert Moments.of(np.zeros(0)) == Moments() and Moments().deviation == 0
