"""Where rows lie on a mesh: each client's whole on one device, in equal parts, and read back in order."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from fedbilevel.canonical import digest_of
from fedbilevel.rows.spread import dealt, in_order, laid, part, slots

COUNTS = np.array([3, 1, 4, 1, 5, 2])


@pytest.mark.parametrize("devices", [1, 2, 3, 6, 8])
def test_every_client_has_its_rows_on_one_device(devices):
    device = dealt(COUNTS, devices)
    assert device.max() < devices and np.all(np.diff(device) >= 0)
    where = part(COUNTS, device, devices)
    held = np.full(devices * where.length, -1)
    for client, (offset, count) in enumerate(zip(where.offsets, COUNTS, strict=True)):
        assert offset // where.length == (offset + count - 1) // where.length == device[client]
        assert np.all(held[offset : offset + count] == -1)
        held[offset : offset + count] = client
    assert where.length == max(COUNTS[device == d].sum() for d in range(devices))
    assert where.first[-1] == COUNTS.sum()


def test_devices_get_about_as_many_rows_each():
    counts = np.random.default_rng(0).integers(1, 50, 1000)
    device = dealt(counts, 4)
    shares = np.bincount(device, counts) / counts.sum()
    assert np.all(np.abs(shares - 0.25) < 0.01)


def test_slots_hold_each_client_once_on_its_device():
    device = np.array([0, 0, 0, 2, 3, 3], np.int32)
    found = slots(device, 4).reshape(4, -1)
    assert found.tolist() == [[0, 1, 2], [-1, -1, -1], [3, -1, -1], [4, 5, -1]]


def test_rows_are_laid_and_read_back_in_order():
    mesh = jax.make_mesh((1,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    rows = np.random.default_rng(1).normal(size=(COUNTS.sum(), 2))
    where = part(COUNTS, np.zeros(len(COUNTS), np.int32), 1)
    array = laid(lambda first, last: rows[first:last], rows, where, mesh)
    assert array.shape == rows.shape
    order = np.array([2, 0, 1, 5, 4, 3])  # clients that lie elsewhere, as over several devices
    own = np.split(rows, np.cumsum(COUNTS)[:-1])
    shuffled = np.concatenate([own[client] for client in order])
    other = laid(lambda first, last: shuffled[first:last], rows, where, mesh)
    offsets = np.empty(len(COUNTS), np.int64)
    offsets[order] = np.cumsum(COUNTS[order]) - COUNTS[order]
    read = in_order(other, offsets, COUNTS)
    np.testing.assert_array_equal(np.concatenate(list(read.pieces())), np.asarray(array))
    assert digest_of(["data", read]) == digest_of(["data", array]) != digest_of(["data", other])
