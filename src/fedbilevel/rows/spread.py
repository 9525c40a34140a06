"""Where rows lie that are spread over the devices of a mesh: each client's whole on one device, clients in order.

A level is still one array with offsets, cut into as many equal parts as there are devices. The parts are as long as the
longest needs; behind the shorter ones' rows there is padding that no offset leads to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np

from ..canonical import Pieces
from ..processes import whole_over


@dataclasses.dataclass(frozen=True)
class Part:
    """One level's place on a mesh.

    Attributes:
        offsets: (clients,) int32, where each client's rows begin in the whole array.
        first: (devices + 1,) the row, of all clients' in order, with which each device's begin; the last is their number.
        length: rows of a device, with padding.
    """

    offsets: np.ndarray
    first: np.ndarray
    length: int


def dealt(rows: np.ndarray, devices: int) -> np.ndarray:
    """(clients,) int32, the device of each: blocks of clients in order, with about as many rows each.

    Args:
        rows: (clients,) how many each has.
    """
    middle = np.cumsum(rows) - rows / 2
    return np.minimum(middle * devices // max(rows.sum(), 1), devices - 1).astype(np.int32)


def part(counts: np.ndarray, device: np.ndarray, devices: int) -> Part:
    """Where the rows of clients lie that have so many each, on these devices."""
    ends = np.cumsum(counts)
    edges = np.searchsorted(device, np.arange(devices + 1))  # the first client of each device
    first = np.concatenate([[0], ends])[edges]
    length = int(np.diff(first).max())
    offsets = device.astype(np.int64) * length + (ends - counts) - first[device]
    return Part(offsets.astype(np.int32), first, length)


def slots(device: np.ndarray, devices: int) -> np.ndarray:
    """(devices * most,) int32: the clients, those of each device side by side; -1 where one has fewer than another."""
    edges = np.searchsorted(device, np.arange(devices + 1))
    most = int(np.diff(edges).max())
    place = edges[:-1, None] + np.arange(most)
    return np.where(place < edges[1:, None], place, -1).astype(np.int32).reshape(-1)


def by_client(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """The first axis over the devices."""
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names[0]))


def laid(rows: Callable[[int, int], np.ndarray], like: np.ndarray, where: Part, mesh: jax.sharding.Mesh) -> jax.Array:
    """(devices * length, ...): an array of all rows in their places.

    Args:
        rows: (first, last) -> those rows, in the clients' order; asked for what this process's devices hold.
        like: an array of rows of the same kind.
    """
    devices = len(where.first) - 1
    shape = (devices * where.length, *like.shape[1:])

    def held(index: tuple[slice, ...] | None) -> np.ndarray:
        device = (index[0].start or 0) // where.length if index else 0
        own = rows(int(where.first[device]), int(where.first[device + 1]))
        return np.concatenate([own, np.zeros((where.length - len(own), *like.shape[1:]), like.dtype)])

    return jax.make_array_from_callback(shape, by_client(mesh), held)


_AT_ONCE = 2**22  # bytes that travel together


def in_order(leaf: jax.Array, offsets: np.ndarray, counts: np.ndarray) -> Pieces:
    """An array of rows that several processes hold, client after client: all call it, and each gets some rows at a time."""
    begins = np.cumsum(counts) - counts
    place = np.repeat(offsets.astype(np.int64) - begins, counts) + np.arange(counts.sum())
    size = int(min(max(1, _AT_ONCE // max(leaf.nbytes // leaf.shape[0], 1)), len(place)))
    take = jax.jit(lambda rows, index: rows[index], out_shardings=whole_over([leaf]))

    def pieces() -> Iterator[np.ndarray]:
        for begin in range(0, len(place), size):
            some = place[begin : begin + size]
            yield np.asarray(take(leaf, np.resize(some, size).astype(np.int32)))[: len(some)]

    return Pieces(np.dtype(leaf.dtype), (len(place), *leaf.shape[1:]), pieces)
