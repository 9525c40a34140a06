"""Partitions place every row exactly once, repeat by key, and skew as their distributions say."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbilevel.errors import InputError
from fedbilevel.partition import PARTITIONS, _top_up, by_quantity, dirichlet, iid, imbalanced, partition, shards

KEY = jax.random.key(7)
seeds = st.integers(0, 2**32 - 1)
alphas = st.one_of(st.floats(1e-3, 100.0), st.sampled_from([5e-324, 1e308, float("inf")]))
everything = settings(max_examples=60, deadline=None)


@st.composite
def cases(draw, least: int = 2):
    """Labels (with gaps and negatives) and a number of clients that have enough rows, often only just."""
    clients = draw(st.integers(1, 12))
    rows = clients * least + draw(st.sampled_from([0, 1, 5, 60]))
    labels = draw(st.lists(st.sampled_from([-3, 0, 1, 2, 7, 400]), min_size=rows, max_size=rows))
    return np.array(labels, draw(st.sampled_from([np.int64, np.int16]))), clients


def assert_a_partition(parts, rows: int, clients: int):
    assert len(parts) == clients
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(rows))


def sizes(parts) -> np.ndarray:
    return np.array([len(part) for part in parts])


@given(st.integers(1, 20), st.integers(0, 100), seeds)
@everything
def test_iid_places_every_row_once_in_even_sizes(clients, more, seed):
    parts = iid(clients + more, clients, jax.random.key(seed))
    assert_a_partition(parts, clients + more, clients)
    assert np.ptp(sizes(parts)) <= 1


@given(cases(least=3), st.integers(1, 3), seeds)
@everything
def test_shards_place_every_row_once_and_hold_few_labels(case, per_client, seed):
    labels, clients = case
    parts = shards(labels, clients, jax.random.key(seed), per_client=per_client)
    assert_a_partition(parts, len(labels), clients)
    assert np.ptp(sizes(parts)) <= per_client
    # walking along the sorted rows, a new (shard, label) pair begins with a shard or with a label
    pairs = sum(len(np.unique(labels[part])) for part in parts)
    assert pairs <= clients * per_client + len(np.unique(labels)) - 1


@given(cases(), alphas, seeds)
@everything
def test_dirichlet_places_every_row_once_and_leaves_nobody_short(case, alpha, seed):
    labels, clients = case
    parts = dirichlet(labels, clients, jax.random.key(seed), alpha=alpha)
    assert_a_partition(parts, len(labels), clients)
    assert sizes(parts).min() >= 2


@given(st.integers(1, 12), st.integers(0, 60), st.integers(1, 4), alphas, seeds)
@everything
def test_by_quantity_places_every_row_once_and_leaves_nobody_short(clients, more, min_rows, alpha, seed):
    rows = clients * min_rows + more
    parts = by_quantity(rows, clients, jax.random.key(seed), alpha=alpha, min_rows=min_rows)
    assert_a_partition(parts, rows, clients)
    assert sizes(parts).min() >= min_rows


@pytest.mark.parametrize("name", PARTITIONS)
def test_the_key_alone_decides(name):
    labels = np.arange(300) % 10
    one, again = (partition(name, labels, 6, KEY) for _ in range(2))
    other = partition(name, labels, 6, jax.random.key(8))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def labels_per_client(parts, labels) -> int:
    return max(len(np.unique(labels[part])) for part in parts)


def test_shards_that_divide_the_labels_evenly_give_at_most_per_client_labels():
    labels = np.random.default_rng(0).permutation(np.arange(600) % 10)
    for per_client in (1, 2, 3):  # 10 labels of 60 rows: shards of 30, 15 and 10 rows never cross a label
        assert labels_per_client(shards(labels, 20, KEY, per_client=per_client), labels) <= per_client
    assert labels_per_client(iid(600, 20, KEY), labels) > 3


def test_shards_are_dealt_at_random():
    labels = np.arange(100) // 10  # ten shards of one label each
    hands = {tuple(labels[shards(labels, 5, jax.random.key(i))[0]]) for i in range(20)}
    assert len(hands) > 5  # of 45: dealt in order, client 0 would get labels 0 and 1 each time


def test_rows_of_one_label_are_shuffled_before_the_cut():
    parts = shards(np.zeros(100, int), 2, KEY, per_client=1)
    assert sorted(part[-1] - part[0] for part in parts) != [49, 49]


def test_dirichlet_shuffles_within_a_label():
    parts = dirichlet(np.zeros(100, int), 2, KEY, alpha=float("inf"))
    assert sizes(parts).tolist() == [50, 50]
    assert sorted(part[-1] - part[0] for part in parts) != [49, 49]


@pytest.mark.parametrize("function", [dirichlet, by_quantity])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 5.0])
def test_the_spread_is_the_dirichlet_distributions(function, alpha):
    """E sum_i p_i^2 = (alpha + 1) / (m alpha + 1) for p ~ Dirichlet(alpha, ..., alpha) over m clients."""
    rows, m, draws = 5000, 8, 200
    first = np.zeros(rows, int) if function is dirichlet else rows
    shares = [sizes(function(first, m, jax.random.key(i), alpha=alpha, min_rows=1)) / rows for i in range(draws)]
    squares = (np.array(shares) ** 2).sum(1)
    error = 4 * squares.std() / draws**0.5 + 2 * m / rows  # Monte-Carlo, and rounding with topping up

    def expected(alpha):
        return (alpha + 1) / (m * alpha + 1)

    assert abs(squares.mean() - expected(alpha)) < error < abs(squares.mean() - expected(2 * alpha))
    np.testing.assert_allclose(np.mean(shares, 0), 1 / m, atol=4 * np.std(shares) / draws**0.5)  # no client favoured


def test_topping_up_takes_no_more_than_is_missing():
    parts = by_quantity(1000, 4, KEY, alpha=5e-324, min_rows=10)  # one client draws everything
    assert sorted(sizes(parts)) == [10, 10, 10, 970]


def test_topping_up_takes_rows_of_any_label():
    labels = np.arange(200) % 2  # each label goes whole to one of two clients: half of the time both to the same
    draws = [dirichlet(labels, 2, jax.random.key(i), alpha=5e-324, min_rows=20) for i in range(20)]
    topped = [part for parts in draws for part in parts if len(part) == 20]
    assert topped and all(5 <= labels[part].sum() <= 15 for part in topped)


def test_labels_are_skewed_by_dirichlet_and_not_by_quantity():
    labels = np.arange(2000) % 10

    def share(parts):
        return np.mean([np.bincount(labels[part]).max() / len(part) for part in parts])

    assert share(dirichlet(labels, 5, KEY, alpha=0.05)) > 0.3
    assert share(dirichlet(labels, 5, KEY, alpha=100.0)) < 0.2
    assert share(by_quantity(2000, 5, KEY, alpha=1.0, min_rows=100)) < 0.25


LABELS = np.arange(20) % 4


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: iid(3, 4, KEY), "3 rows are too few for 4 clients"),
        (lambda: iid(0, 1, KEY), "0 rows are too few"),
        (lambda: iid(3, 0, KEY), "clients= must be a whole number, 1 or more; got 0"),
        (lambda: iid(3, 1.0, KEY), "clients= must be a whole number"),
        (lambda: iid(3, True, KEY), "clients= must be a whole number"),
        (lambda: iid(-3, 1, KEY), "rows= must be a whole number, 0 or more"),
        (lambda: shards(LABELS, 7, KEY, per_client=3), "20 rows are too few for 7 clients.*shards"),
        (lambda: shards(LABELS, 2, KEY, per_client=0), "per_client= must be a whole number"),
        (lambda: shards(LABELS.astype(float), 2, KEY), "one integer for each row; got float64 of shape .20,."),
        (lambda: shards(LABELS.reshape(2, 10), 2, KEY), "one integer for each row"),
        (lambda: shards([[1], [2, 3]], 2, KEY), "lists of unequal lengths"),
        (lambda: dirichlet(3, 2, KEY), "one integer for each row"),
        (lambda: dirichlet(LABELS == 1, 2, KEY), "got bool"),
        (lambda: dirichlet(LABELS, 11, KEY), "20 rows are too few for 11 clients.*at least 2 .min_rows=."),
        (lambda: dirichlet(LABELS, 2, KEY, min_rows=0), "min_rows= must be a whole number, 1 or more"),
        (lambda: dirichlet(LABELS, 2, KEY, alpha=0.0), "alpha= must be a positive number; got 0.0"),
        (lambda: dirichlet(LABELS, 2, KEY, alpha=float("nan")), "alpha= must be a positive number"),
        (lambda: by_quantity(20, 2, KEY, alpha=-1), "alpha= must be a positive number; got -1"),
        (lambda: by_quantity(20, 2, KEY, alpha="1"), "alpha= must be a positive number"),
        (lambda: by_quantity(20, 2, KEY, min_rows=11), "20 rows are too few"),
        (lambda: partition("dirichelt", LABELS, 2, KEY), "did you mean 'dirichlet'"),
        (lambda: partition("dirichlet", LABELS, 2, KEY, alhpa=1), "did you mean 'alpha'"),
        (lambda: partition("iid", LABELS, 2, KEY, alpha=1), "takes no options: drop alpha="),
        (lambda: partition("iid", 5, 2, KEY), "one label for each row"),
        (lambda: imbalanced(LABELS, 0.0, KEY), "ratio= must be a number above 0 and at most 1; got 0.0"),
        (lambda: imbalanced(LABELS, 1.5, KEY), "at most 1; got 1.5"),
        (lambda: imbalanced(LABELS, float("nan"), KEY), "at most 1; got nan"),
        (lambda: imbalanced(LABELS, 0.5, KEY, largest=0), "largest= must be a whole number, 1 or more; got 0"),
        (lambda: imbalanced(LABELS / 2, 0.5, KEY), "one integer for each row"),
    ],
)
def test_refusals_are_one_sentence(call, words):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_partition_by_name_is_the_function_itself():
    targets = np.linspace(0, 1, 20)  # of a regression: counted, not looked at
    named = partition("quantity", targets, 3, KEY, alpha=2.0, min_rows=3)
    assert all(np.array_equal(a, b) for a, b in zip(named, by_quantity(20, 3, KEY, 2.0, 3), strict=True))
    named = partition("shards", jax.numpy.asarray(LABELS), 3, KEY, per_client=1)
    assert all(np.array_equal(a, b) for a, b in zip(named, shards(LABELS, 3, KEY, 1), strict=True))


def test_imbalanced_classes_shrink_geometrically():
    labels = np.random.default_rng(0).permutation(np.repeat([-2, 5, 6, 40], [90, 200, 300, 200]))
    rows = imbalanced(labels, 0.125, KEY, largest=120)  # 120 * (1/2)^c: 120 (of 90), 60, 30, 15, and one more of each
    assert rows.dtype == np.int64 and (np.diff(rows) > 0).all()
    assert np.unique(labels[rows], return_counts=True)[1].tolist() == [90, 61, 31, 16]
    assert np.unique(labels[imbalanced(labels, 0.01, KEY)], return_counts=True)[1].tolist() == [90, 65, 14, 4]
    np.testing.assert_array_equal(imbalanced(labels, 1, KEY), np.arange(790))


def test_imbalanced_needs_no_more_than_one_label_or_row():
    np.testing.assert_array_equal(imbalanced(np.zeros(5, int), 0.01, KEY), np.arange(5))
    np.testing.assert_array_equal(imbalanced(np.arange(3), 1e-300, KEY), np.arange(3))
    assert len(imbalanced(np.zeros(0, int), 0.5, KEY)) == 0
    labels = np.repeat([0, 1], 100)  # 29 rows and one more, though 100 * 0.29 is a little less than 29
    assert labels[imbalanced(labels, 0.29, KEY, largest=100)].sum() == 30


def test_the_key_decides_which_rows_an_imbalance_leaves():
    labels = np.arange(300) % 10
    kept = [imbalanced(labels, 0.1, jax.random.key(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(kept[0], kept[1])
    assert len(kept[0]) == len(kept[2]) and not np.array_equal(kept[0], kept[2])
    assert not np.array_equal(kept[0][labels[kept[0]] == 9], np.flatnonzero(labels == 9)[:4])  # not just the first


def one_by_one(parts, least):
    """Topping up as it is described: a row at a time, the last one of the first of the largest."""
    hands = [list(part) for part in parts]
    for hand in hands:
        while len(hand) < least:
            hand.append(max(hands, key=len).pop())
    return hands


@pytest.mark.parametrize("seed", range(30))
def test_topping_up_all_at_once_moves_the_rows_that_one_by_one_moves(seed):
    draw = np.random.default_rng(seed)
    counts = draw.integers(0, (2, 5, 40)[seed % 3], draw.integers(1, 12))
    least = int(draw.integers(0, counts.sum() // len(counts) + 1))
    rows = draw.permutation(counts.sum())
    flat, sizes = _top_up(rows, counts, least)
    expected = one_by_one(np.split(rows, np.cumsum(counts)[:-1]), least)
    assert sizes.tolist() == [len(hand) for hand in expected]
    assert [set(part) for part in np.split(flat, np.cumsum(sizes)[:-1])] == [set(hand) for hand in expected]


@pytest.mark.parametrize("seed", range(5))
def test_parts_are_those_of_a_plain_loop(seed):
    """The same draws in the same order, client by client."""
    labels, key, clients = np.random.default_rng(seed).integers(0, 4, 120), jax.random.key(seed), 9
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    parts = [[] for _ in range(clients)]
    for label in np.unique(labels):
        order = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(np.cumsum(rng.dirichlet(np.full(clients, 0.3)))[:-1] * len(order)).astype(int)
        parts = [[*part, *dealt] for part, dealt in zip(parts, np.split(order, cuts), strict=True)]
    expected = one_by_one([rng.permutation(np.array(part, int)) for part in parts], 2)
    assert [part.tolist() for part in dirichlet(labels, clients, key, 0.3)] == [sorted(hand) for hand in expected]

    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    order = rng.permutation(120)
    pieces = np.array_split(order[np.argsort(labels[order], kind="stable")], 27)
    hands = rng.permutation(27).reshape(clients, 3)
    expected = [sorted(np.concatenate([pieces[piece] for piece in hand])) for hand in hands]
    assert [part.tolist() for part in shards(labels, clients, key, 3)] == expected
