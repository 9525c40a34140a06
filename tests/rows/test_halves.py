"""Strata: the same share of each, the sum as without them, in the order that is drawn without them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedbilevel.rows.halves import by_kind, halves

SEEDS = np.arange(20, dtype=np.uint32).reshape(10, 2)
clients = st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=40), min_size=1, max_size=5)


@given(clients, st.floats(0.01, 0.99))
def test_each_kind_has_its_share(kinds, outer):
    kinds = [np.array(own) for own in kinds]
    counts = np.array([len(own) for own in kinds])
    (inner, held), (_, plain) = by_kind(kinds, outer, SEEDS[: len(kinds)]), halves(counts, outer, SEEDS[: len(kinds)])
    np.testing.assert_array_equal(held.counts, plain.counts)
    np.testing.assert_array_equal(inner.counts + held.counts, counts)
    inside, outside = (np.split(each.rows, np.cumsum(each.counts)[:-1]) for each in (inner, held))
    for own, one, other in zip(kinds, inside, outside, strict=True):
        assert sorted([*one, *other]) == list(range(len(own)))
        wanted = np.bincount(own, minlength=5) * len(other) / len(own)
        assert (np.abs(np.bincount(own[other], minlength=5) - wanted) < 1).all()


@given(clients, st.floats(0.01, 0.99))
def test_of_one_kind_it_is_the_plain_split(kinds, outer):
    counts = np.array([len(own) for own in kinds])
    several = (
        by_kind([np.zeros(count, np.int64) for count in counts], outer, SEEDS[: len(kinds)]),
        halves(counts, outer, SEEDS[: len(kinds)]),
    )
    for own, plain in zip(*several, strict=True):
        np.testing.assert_array_equal(own.rows, plain.rows)
