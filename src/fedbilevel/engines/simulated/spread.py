"""Rows over the devices of a mesh, and what is computed where they lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ...arrays import entry
from ...arrays import on_device as as_array
from ...data import ClientRows, FederatedData, Level
from ...errors import check
from ...processes import apart
from ...rows.spread import by_client, dealt, laid, part, slots

AT_ONCE = 2**26  # bytes of a cohort's rows that travel whole, and lie on every device for a moment
_Part: TypeAlias = tuple[PyTree, Int[Array, ""]]  # a device's rows, and where in the whole array they begin


def spread_over(data: FederatedData, mesh: jax.sharding.Mesh) -> FederatedData:
    """Rows over the devices, each client's on one; what describes them stays everywhere.

    Raises:
        InputError: they lie over the devices of another mesh.
    """
    devices = mesh.devices.size
    levels = data.inner, data.outer
    if any(map(apart, jax.tree.leaves([level.rows for level in levels]))):
        held = next(leaf.sharding.mesh for leaf in jax.tree.leaves(data.inner.rows))
        check(held == mesh, "the data were loaded over another mesh than Simulation(mesh=): give both the same.")
        length = jax.tree.leaves(data.inner.rows)[0].shape[0] // devices
        device = np.asarray(data.inner.offsets) // length
    else:
        device = dealt(data.count("inner") + data.count("outer"), devices)
        levels = [_spread(level, device, mesh) for level in levels]
    return eqx.tree_at(
        lambda d: (d.inner, d.outer, d.slots), data, (*levels, as_array(slots(device, devices))),
        is_leaf=lambda leaf: leaf is None,
    )  # fmt: skip


def _spread(level: Level, device: np.ndarray, mesh: jax.sharding.Mesh) -> Level:
    where = part(np.asarray(level.counts), device, mesh.devices.size)

    def spread(leaf: Array) -> Array:
        held = np.asarray(leaf)
        return laid(lambda first, last: held[first:last], held, where, mesh)

    rows, offsets = jax.tree.map(spread, level.rows), as_array(where.offsets)
    return Level(rows, offsets, level.counts, level.scale, level.most, level.sizes)  # rows lie as no other level's do


def on_each(
    one: Callable[[tuple[Int[Array, ""], None, None, None], tuple[_Part, _Part]], PyTree],
    index: Int[Array, " slots"],
    rows: tuple[PyTree, PyTree],
    mesh: jax.sharding.Mesh,
) -> PyTree:
    """What `one` says of each slot, computed on the device whose slot it is, from that device's rows.

    Args:
        one: (client, nothing known of it, nor of its state), its device's rows at both levels -> a pytree.
        index: the client of each slot, each device's side by side.
        rows: of both levels, all devices'.
    """
    devices = mesh.devices.size
    parted = lambda leaf: jnp.reshape(leaf, (devices, leaf.shape[0] // devices, *leaf.shape[1:]))
    begins = [jnp.arange(devices, dtype=jnp.int32) * (jax.tree.leaves(of)[0].shape[0] // devices) for of in rows]

    def device(own: Int[Array, " some"], inner: _Part, outer: _Part) -> PyTree:
        return jax.vmap(lambda i: one((i, None, None, None), (inner, outer)))(own)

    mine, theirs = (jax.tree.map(parted, of) for of in rows)
    index = jax.lax.with_sharding_constraint(parted(index), by_client(mesh))
    out = jax.vmap(device)(index, (mine, begins[0]), (theirs, begins[1]))
    return jax.tree.map(lambda leaf: jnp.reshape(leaf, (-1, *leaf.shape[2:])), out)


def fetched(
    level: Level, index: Int[Array, " slots"], mesh: jax.sharding.Mesh
) -> tuple[PyTree, Int[Array, " slots"]] | None:
    """(The rows of a cohort's clients, leaves (slots, most, ...), where each one's begin in the whole array).

    They travel once an exchange, however often its local steps draw from them. None where they are too many for that.
    """
    row = sum(leaf.size // leaf.shape[0] * leaf.dtype.itemsize for leaf in jax.tree.leaves(level.rows))
    if row * level.most * index.shape[0] > AT_ONCE:
        return None
    within = jnp.arange(level.most, dtype=jnp.int32)
    begins, counts = level.offsets[index], level.counts[index]
    place = jax.vmap(lambda begin, count: begin + jnp.minimum(within, count - 1))(begins, counts)
    own = lambda leaf: jax.lax.with_sharding_constraint(entry(leaf, place), by_client(mesh))
    return jax.tree.map(own, level.rows), begins


def without_padding(
    real: Bool[Array, " slots"], replies: PyTree, weights: Float[Array, " slots"] | None, clients: int
) -> tuple[PyTree, Float[Array, " slots"]]:
    """(The replies with zeros in slots without a client, weights of all slots): each device sums its own, and sums travel.

    Args:
        weights: of the slots' clients, or None where they count alike.
    """
    here = lambda leaf: real.reshape(-1, *[1] * (leaf.ndim - 1))
    alike = jnp.full(real.shape, 1 / clients)
    replies = jax.tree.map(lambda leaf: jnp.where(here(leaf), leaf, jnp.zeros_like(leaf)), replies)
    return replies, jnp.where(real, alike if weights is None else weights, 0.0)


def on_device(rows: ClientRows, held: _Part) -> ClientRows:
    """A client's rows among those of its device. (Of a slot without a client, whatever lies there: it does not count.)"""
    own, begin = held
    return dataclasses.replace(rows, rows=own, offset=jnp.maximum(rows.offset - begin, 0))
