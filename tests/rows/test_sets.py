"""Clients read at a glance: the same rows as one by one, for all forms in which they are passed; nothing is let through."""

from __future__ import annotations

import collections

import jax
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.rows import join, sets
from fedbilevel.rows.sets import read_all

KEY = jax.random.key(11)
DRAW = np.random.default_rng(2)
COUNTS = [5] * 40 + [2, 3, 70, 9] + [5] * 7
Pair = collections.namedtuple("Pair", "a label")


def client(count, kind=dict):
    a, label = DRAW.normal(size=(count, 3)).astype("f"), DRAW.integers(0, 4, count).astype("i4")
    return {dict: {"label": label, "a": a}, tuple: (a, label), Pair: Pair(a, label), np.ndarray: a}[kind]


@pytest.fixture(params=[dict, tuple, Pair, np.ndarray], ids=lambda kind: kind.__name__)
def clients(request):
    return [client(count, request.param) for count in COUNTS]


def flat(rows, orders=None):
    """The rows side by side, in a plain loop."""
    orders = orders or [np.arange(len(jax.tree.leaves(own)[0])) for own in rows]
    parts = [jax.tree.map(lambda leaf, order=order: leaf[order], own) for own, order in zip(rows, orders, strict=True)]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def equal(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, own in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == own.dtype and np.array_equal(leaf, own)


def test_stacked_rows_are_those_of_a_loop(clients, monkeypatch):
    monkeypatch.setattr(sets, "_BLOCK", 7)
    data = fb.FederatedData.stack(clients, clients[::-1], weights="rows")
    equal(data.inner.rows, flat(clients))
    equal(data.outer.rows, flat(clients[::-1]))
    assert data.count("inner").tolist() == COUNTS and data.names[41] == "client 41"
    assert np.array_equal(data.inner.offsets, np.cumsum([0, *COUNTS[:-1]]))


def test_split_rows_are_those_of_a_loop(clients, monkeypatch):
    monkeypatch.setattr(join, "_AT_ONCE", 30)
    forms = [clients, iter(clients)] + [dict(enumerate(clients))] * (type(clients[0]) is not np.ndarray)
    for data in (fb.FederatedData.split(form, 0.3, KEY) for form in forms):
        orders = []
        for index, count in enumerate(COUNTS):
            seed = np.asarray(jax.random.key_data(jax.random.fold_in(KEY, index)))
            held = min(max(round(0.3 * count), 1), count - 1)
            orders.append(np.split(np.random.default_rng(seed).permutation(count), [held]))
        equal(data.outer.rows, flat(clients, [outer for outer, _ in orders]))
        equal(data.inner.rows, flat(clients, [inner for _, inner in orders]))


def test_an_array_of_clients_and_what_numpy_does_not_call_plain():
    stacked = np.stack([client(5, np.ndarray) for _ in range(6)])
    equal(fb.FederatedData.stack(stacked, stacked).inner.rows, stacked.reshape(30, 3))
    big = [own.astype(">f4") for own in stacked]
    assert read_all(big, [""] * 6).reads is None
    equal(fb.FederatedData.stack(big, big).inner.rows, stacked.reshape(30, 3))


UNLIKE = {
    "a list for a tuple": (lambda own: list(own.values()), "other inner data than client 0"),
    "another dict": (lambda own: collections.OrderedDict(own), "other inner data than client 0"),
    "another key": (lambda own: {**own, "b": own["a"]}, "other inner data than client 0"),
    "another dtype": (lambda own: {**own, "a": own["a"].astype("f8")}, "f64[5,3](numpy) against f32[5,3](numpy)"),
    "another shape": (lambda own: {**own, "a": own["a"][:, :2]}, "f32[5,2](numpy) against f32[5,3](numpy)"),
    "fewer rows": (lambda own: {**own, "a": own["a"][:4]}, "the same number of rows"),
    "no rows": (lambda own: {name: leaf[:0] for name, leaf in own.items()}, "has no inner rows"),
    "a number": (lambda own: {**own, "label": np.array(3)}, "has 3 where there should be an array"),
    "a masked array": (lambda own: {**own, "a": np.ma.masked_less(own["a"], 0)}, "has masked values"),
    "nothing": (lambda own: {**own, "a": None}, "other inner data than client 0"),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_one_among_many_that_differs_is_refused_by_its_name(what):
    change, words = UNLIKE[what]
    many = [client(5) for _ in range(30)]
    many[17] = change(many[17])
    with pytest.raises(fb.InputError, match=r"^client 17") as error:
        fb.FederatedData.stack(many, [client(5)] * 30)
    assert words in str(error.value)


def test_the_first_of_several_is_named_and_too_few_rows_for_a_split():
    many = [client(5) for _ in range(30)]
    many[20], many[9], many[12] = client(1), {**many[9], "a": np.ma.masked_less(many[9]["a"], 9)}, client(1)
    for named in ("client 9 has masked", "client 12 has 1 rows, but a split needs at least 2"):
        with pytest.raises(fb.InputError, match=named):
            fb.FederatedData.split(many, 0.5, KEY)
        many[9] = client(5)


def test_arrays_of_jax_among_those_of_numpy_are_read_one_by_one():
    many = [client(5) for _ in range(4)]
    mixed = [jax.tree.map(jax.numpy.asarray, own) if index == 2 else own for index, own in enumerate(many)]
    assert read_all(mixed, [""] * 4).reads is not None
    equal(fb.FederatedData.stack(mixed, mixed).inner.rows, flat(many))
