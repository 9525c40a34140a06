"""Rows loaded client by client are those that are stacked; what processes tell each other of theirs is compared."""

from __future__ import annotations

import copy

import jax
import numpy as np
import pandas as pd
import pytest

import fedbilevel as fb
from fedbilevel.loader import _check_alike, _devices, _told
from helpers.checks import unchecked


def rows(client):
    draw = np.random.default_rng(client)
    return {"a": draw.normal(size=(client + 1, 2))}, {"a": draw.normal(size=(3, 2))}


def table(*columns):
    return fb.FederatedData.stack([pd.DataFrame({name: [1.0, 2.0] for name in columns})], [np.ones((2, 2))])


def test_one_process_loads_all_and_gets_what_stack_gives():
    asked = []

    def load(client):
        asked.append(client)
        return rows(client)

    loaded = fb.load_clients(load, 4, weights="rows", names=["a", "b", "c", "d"])
    stacked = fb.FederatedData.stack(*zip(*map(rows, range(4)), strict=True), "rows", ["a", "b", "c", "d"])
    assert asked == [0, 1, 2, 3] and loaded.names == stacked.names
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(stacked), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("load", "error", "sentence"),
    [
        (lambda i: rows(i)[0], fb.InputError, r"load\(0\) returns \(inner rows, outer rows\), a tuple of two"),
        (lambda i: 1 / 0, fb.RunError, r"load\(0\) failed: ZeroDivisionError: division by zero"),
        (lambda i: ({"a": np.full((2, 2), np.nan)}, rows(i)[1]), fb.InputError, "client 0 has NaN"),
    ],
)
def test_what_cannot_be_loaded_is_refused(load, error, sentence):
    with pytest.raises(error, match=sentence):
        fb.load_clients(load, 2)


def test_processes_with_the_same_kind_of_rows_go_together():
    one, other = (_told(fb.FederatedData.stack(*zip(rows(i), strict=True)), f"client {i}") for i in (0, 5))
    assert other["inner"]["counts"] == [6]
    _check_alike(other, one)


def test_rows_of_another_process_that_differ_are_refused_with_both_clients():
    one = _told(fb.FederatedData.stack(*zip(rows(0), strict=True)), "client 0")
    other = copy.deepcopy(one) | {"name": "client 7"}
    other["outer"] = {**one["outer"], "leaves": [["int32", 2]], "rows": "{'a': i32[3,2]}"}
    with pytest.raises(fb.InputError, match=r"client 7 has other outer data than client 0: .*i32\[3,2\].* against"):
        _check_alike(other, one)


def test_columns_of_another_process_that_differ_are_named():
    one, other = _told(table("age", "dose"), "north"), _told(table("age", "sex"), "south")
    with pytest.raises(fb.InputError, match="south has a column 'sex' where north has 'dose', in its inner rows"):
        _check_alike(other, one)


class _Device:
    def __init__(self, process_index):
        self.process_index = process_index


class _Mesh:
    devices = np.array([_Device(0), _Device(1), _Device(1)])


def test_a_client_lies_on_a_device_of_the_process_that_loads_it():
    with unchecked():
        found = _devices(np.array([5, 1, 9, 1, 1, 9]), [2, 4], _Mesh())
    assert found.tolist() == [0, 0, 1, 1, 2, 2]
