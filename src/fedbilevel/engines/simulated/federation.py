"""`fed` inside the simulated program, and rows over the devices of a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from ...algorithm import Algorithm
from ...cohorts import answered, client_key, combine_replies, full_weights, stays
from ...data import FederatedData, entry
from ...federation import Client, Combine, Flag, Reply
from ...problem import Problem
from ...processes import apart
from ...protocol.sites import Path
from ...protocol.traced import TracedFederation
from ..base import Program


@dataclasses.dataclass(frozen=True)
class Static:
    """What a simulated program is compiled for, beside the structure of its arguments."""

    program: Program
    cohort: int
    client_batch: int | None
    mesh: jax.sharding.Mesh | None
    layout: tuple[tuple[Path, int], ...]
    drops: bool = False
    rounds: tuple[Path, ...] = ()  # the exchanges that are rounds of their own


class SimulatedFederation(TracedFederation):
    """`fed` inside the simulated program: an exchange is a vmap of the client method over the cohort.

    Where exchanges ask the same clients (everyone, or a cohort that the program drew for them), the features of their
    rows at the iteration's x are computed once, before any loop; what no exchange uses, the compiler drops. Not so on a
    mesh, nor with `client_batch`, which bounds the memory that they would take: then once in each exchange.
    """

    def __init__(
        self,
        static: Static,
        problem: Problem,
        data: FederatedData,
        algorithm: Algorithm,
        key: Key[Array, ""],
        state: PyTree,
        client_state: PyTree,
        dropout: float | Float[Array, ""] = 0.0,
    ):
        self.drops, self._dropout = static.drops, dropout
        super().__init__(algorithm, data.clients, static.cohort, data.weights, key, dict(static.layout))
        self._static, self._problem, self._data, self._x = static, problem, data, state.x
        self.client_state = client_state
        self._known: list[tuple[Int[Array, " cohort"], PyTree]] = []  # (cohort, features of its clients' inner rows)
        if static.cohort == data.clients:
            self._remember(jnp.arange(data.clients, dtype=jnp.int32))

    def draw_cohort(self, size: int | None = None) -> Int[Array, " cohort"]:
        cohort = super().draw_cohort(size)
        self._remember(cohort)
        return cohort

    def _remember(self, cohort: Int[Array, " cohort"]) -> None:
        batch = self._static.client_batch
        at_once = self._static.mesh is None and (batch is None or batch >= cohort.shape[0])
        if self._problem.features is not None and at_once:
            features = lambda i: self._data.inner.client(i).with_features(self._problem, self._x).features
            self._known.append((cohort, jax.vmap(features)(cohort)))

    def exchange(
        self,
        name: str,
        method: Callable[..., PyTree],
        message: PyTree,
        combine: Combine,
        wanted: tuple[Flag, ...],
        key: Key[Array, ""],
        cohort: Int[Array, " cohort"] | None,
    ) -> tuple[PyTree, PyTree]:
        if cohort is None and self._static.cohort == self.clients and self._known:
            cohort = self._known[0][0]
        index = self.sample(key) if cohort is None else cohort
        features = next((phi for known, phi in self._known if known is index), None)
        size, slots = index.shape[0], index.shape[0]
        if self._static.mesh is not None:  # pad to whole devices; the extra slots' replies are cut off again
            devices = self._static.mesh.devices.shape[0]
            slots = -(-size // devices) * devices
            index = jnp.concatenate([index, jnp.broadcast_to(index[-1:], (slots - size,))])
            index = jax.lax.with_sharding_constraint(index, by_client(self._static.mesh))
        flags = tuple(jnp.asarray(flag, bool) for flag in wanted)
        present = None
        if self.drops:
            present = stays(key, index[:size], self._dropout)
            self._replied = jnp.sum(present, dtype=jnp.int32)
            self._share = answered(self._data.weights, index[:size], present, self.clients)

        def one(slot: tuple[Int[Array, ""], PyTree]) -> tuple[PyTree, PyTree]:
            i, phi = slot
            inner, outer = self._data.inner.client(i), self._data.outer.client(i)
            if phi is not None:
                inner = dataclasses.replace(inner, features=phi, at=self._x)
            state = jax.tree.map(lambda leaf: entry(leaf, i), self.client_state)
            client = Client(self._problem, (inner, outer), state, client_key(key, i), flags, i)
            out = self.replied(name, method, client, message)
            return (out.reply, out.state) if isinstance(out, Reply) else (out, None)

        batch = self._static.client_batch
        if batch is None or batch >= slots:
            replies, states = jax.vmap(one)((index, features))
        else:
            replies, states = jax.lax.map(one, (index, features), batch_size=batch)
        if slots > size:
            replies, states, index = jax.tree.map(lambda leaf: leaf[:size], (replies, states, index))
        if states is not None:
            to = index if present is None else jnp.where(present, index, self.clients)  # out of range: dropped
            put = lambda all, new: all.at[to].set(new.astype(all.dtype), mode="drop")
            self.client_state = jax.tree.map(put, self.client_state, states)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), replies)
        return shapes, combine_replies(combine, replies, full_weights(self._data.weights, index, self.clients), present)


def by_client(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names[0]))


def spread_over(data: FederatedData, mesh: jax.sharding.Mesh) -> FederatedData:
    """Rows over the devices, padded to as many for each; what describes them stays everywhere."""
    devices = mesh.devices.shape[0]

    def spread(leaf: np.ndarray | Array) -> Array:
        if isinstance(leaf, jax.Array) and apart(leaf):
            return leaf
        own = np.asarray(leaf)
        short = -own.shape[0] % devices
        padded = np.concatenate([own, np.zeros((short, *own.shape[1:]), own.dtype)]) if short else own
        return jax.make_array_from_callback(padded.shape, by_client(mesh), lambda index: padded[index])

    rows = lambda d: (d.inner.rows, d.outer.rows)
    return eqx.tree_at(rows, data, jax.tree.map(spread, rows(data)))
