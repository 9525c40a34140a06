"""`fed` inside the simulated program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from ... import owned
from ...algorithm import Algorithm
from ...arrays import entry
from ...blocks import Cut
from ...cohorts import answered, by_part, client_key, combine_replies, full_weights, stays
from ...component import title_of
from ...data import FederatedData, Level
from ...errors import check
from ...federation import Client, Combine, Flag, Reply, Way
from ...problem import Problem, own_oracles
from ...protocol.sites import Path
from ...protocol.traced import TracedFederation
from ...rows.spread import by_client
from ..base import Program
from .draws import Draws, draw
from .on_disk import Filed
from .spread import fetched, on_device, on_each, without_padding
from .windows import Window


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
    exchanges: int = 0  # what so many exchanges draw is drawn at once; 0: each draws its own
    usual: bool = False  # whether it is an algorithm's iteration, each exchange of which asks `cohort` clients

    @property
    def asked(self) -> int:
        """How many clients an iteration asks at most, each as often as it is asked; 0: that is not known."""
        return self.exchanges * self.cohort if self.usual and self.mesh is None else 0


class SimulatedFederation(TracedFederation):
    """`fed` inside the simulated program: an exchange is a vmap of the client method over the cohort.

    Where exchanges ask the same clients (everyone, or a cohort that the program drew for them), the features of their
    rows at the iteration's x are computed once, before any loop; what no exchange uses, the compiler drops. Not so on a
    mesh, nor with `client_batch`, which bounds the memory that they would take: then once in each exchange.

    With a `window` the server's state, and so its messages, have the blocks of those who are in it, and no others.

    On a mesh an exchange with everybody is computed where each client's rows lie. That with a cohort is dealt out to the
    devices evenly, and the cohort's rows travel.
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
        window: Window | None = None,
    ):
        self.drops, self._dropout = static.drops, dropout
        super().__init__(algorithm, data.clients, static.cohort, data.weights, key, dict(static.layout))
        self._static, self._problem, self._data, self._x = static, problem, data, state.x
        self.client_state = client_state
        self._window = window
        self._draws: Draws | None = None if window is None else window.draws
        if static.exchanges and window is None:
            self._draws = draw(key, static.exchanges, data.clients, static.cohort, data.weights)
        self._known: list[_Known] = []
        self._drawn: list[Int[Array, " cohort"]] = []  # by the program
        if static.cohort == data.clients:
            self._remember(jnp.arange(data.clients, dtype=jnp.int32))

    def _own_key(self) -> Key[Array, ""]:
        return super()._own_key() if self._draws is None else self._draws.key(self._counter)

    def sample(self, key: Key[Array, ""], size: int | None = None) -> Int[Array, " cohort"]:
        usual = self._draws is not None and size in (None, self.cohort_size)
        known = self._draws.cohort(self._counter) if self._draws is not None and usual else None
        return super().sample(key, size) if known is None else known

    def draw_cohort(self, size: int | None = None) -> Int[Array, " cohort"]:
        cohort = super().draw_cohort(size)
        self._drawn.append(cohort)
        self._remember(cohort)
        return cohort

    def _remember(self, cohort: Int[Array, " cohort"]) -> None:
        size = cohort.shape[0]
        if self._problem.features is None or self._static.mesh is not None or self._at_once(size) < size:
            return
        if owned.nodes(self._x):  # clients' x differ from what it is known by
            return
        inner = self._data.inner
        cut = self._cut(inner, size)

        def features(i: Int[Array, ""]) -> tuple[PyTree, Int[Array, ""] | None]:
            rows = inner.client(i, cut).with_features(self._problem, self._x)
            return rows.features, rows.base

        each = cut is None or own_oracles(type(self._problem))  # or else one buffer for all
        phi, base = jax.vmap(features, out_axes=(0 if each else None, 0))(cohort)
        if phi is not None:
            self._known.append(_Known(cohort, phi, base, each))

    def _at_once(self, slots: int) -> int:
        batch = self._static.client_batch
        return slots if batch is None else min(batch, slots)

    def _cut(self, level: Level, slots: int) -> Cut | None:
        """How full batches of a level are cut for so many clients of an exchange."""
        twice = self._data.weights is not None and slots < self.clients  # a cohort drawn with replacement
        return level.cut(self._at_once(slots), keeps=self._static.mesh is None and not twice)

    def _smallest(self) -> Int[Array, ""]:
        """The client that stands where a device has no other: what it says there does not count."""
        return jnp.argmin(self._data.inner.counts + self._data.outer.counts).astype(jnp.int32)

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
        chosen = cohort is not None  # by the program
        check(
            not chosen or self._window is None or any(cohort is one for one in self._drawn),
            f"{title_of(self._algorithm)} has spares_unasked, and asks clients of its own choice: ask cohorts from "
            "fed.draw_cohort(), or leave spares_unasked out.",
        )
        if cohort is None and self._static.cohort == self.clients and self._known:
            cohort = self._known[0].cohort
        index = self.sample(key) if cohort is None else cohort
        known = next((known for known in self._known if known.cohort is index), None)
        size, slots, real = index.shape[0], index.shape[0], None
        mesh, lying = self._static.mesh, self._data.slots
        if mesh is not None and lying is not None and size == self.clients:  # each where its rows lie
            index, real, slots = jnp.where(lying >= 0, lying, self._smallest()), lying >= 0, lying.shape[0]
        elif mesh is not None:  # pad to whole devices; the extra slots' replies are cut off again
            slots = -(-size // mesh.devices.shape[0]) * mesh.devices.shape[0]
            index = jnp.concatenate([index, jnp.broadcast_to(index[-1:], (slots - size,))])
            index = jax.lax.with_sharding_constraint(index, by_client(mesh))
        keys = None
        if self._draws is not None and mesh is None and not chosen:
            keys = self._draws.client_keys(self._counter)
        flags = tuple(jnp.asarray(flag, bool) for flag in wanted)
        present = None
        if self.drops:
            asked = index[:size] if real is None else jnp.arange(size, dtype=jnp.int32)
            present = stays(key, asked, self._dropout)
            self._replied = jnp.sum(present, dtype=jnp.int32)
            self._share = answered(self._data.weights, asked, present, self.clients)
        if real is not None:
            present = real if present is None else real & present[index]

        kept = None
        if isinstance(self.client_state, Filed):
            self.client_state, kept = self.client_state.read(index)
        cuts = self._cut(self._data.inner, slots), self._cut(self._data.outer, slots)

        def one(
            slot: tuple[Int[Array, ""], PyTree, PyTree, Key[Array, ""] | None],
            part: tuple[PyTree, PyTree] | None = None,
        ) -> tuple[PyTree, PyTree]:
            i, own, state, secret = slot
            inner, outer = self._data.inner.client(i, cuts[0]), self._data.outer.client(i, cuts[1])
            if part is not None:
                inner, outer = on_device(inner, part[0]), on_device(outer, part[1])
            if known is not None:
                phi, base = own if known.each else (known.features, own)
                inner = dataclasses.replace(inner, features=phi, at=self._x, base=base)
            if kept is None:
                state = jax.tree.map(lambda leaf: entry(leaf, i), self.client_state)
            secret = client_key(key, i) if secret is None else secret
            client = Client(self._problem, (inner, outer), state, secret, flags, i)
            out = self.replied(name, method, client, owned.own(message, self._place(i)))
            return (out.reply, out.state) if isinstance(out, Reply) else (out, None)

        own = None if known is None else (known.features, known.base) if known.each else known.base
        parts = None if mesh is None or real is not None or any(cuts) else self._fetched(index, mesh)
        if parts is not None:
            replies, states = jax.vmap(one)((index, own, kept, keys), parts)
        elif real is not None and mesh is not None:
            replies, states = on_each(one, index, (self._data.inner.rows, self._data.outer.rows), mesh)
        elif (batch := self._at_once(slots)) == slots:
            replies, states = jax.vmap(one)((index, own, kept, keys))
        else:
            replies, states = jax.lax.map(one, (index, own, kept, keys), batch_size=batch)
        if slots > size and real is None:
            replies, states, index = jax.tree.map(lambda leaf: leaf[:size], (replies, states, index))
        if states is not None:
            self._keep(index, present, states)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), replies)
        weights = full_weights(self._data.weights, index, self.clients)
        padded = None if self.drops else real

        def combined(way: Way, part: PyTree) -> PyTree:
            if padded is None or way != "mean":
                return combine_replies(way, part, weights, present)
            return combine_replies(way, *without_padding(padded, part, weights, self.clients))

        reply = by_part(combine, owned.without(replies), combined)
        if owned.nodes(replies):
            places = self.clients if self._window is None else self._window.places
            self._present = owned.answered(self._place(index), present, places)
            reply = owned.with_blocks(reply, replies, self._place(index), present, places)
        return shapes, reply

    def _place(self, index: Int[Array, "*those"]) -> Int[Array, "*those"]:
        """Where clients' blocks are in the server's state."""
        return index if self._window is None else entry(self._window.place, index)

    def _fetched(self, index: Int[Array, " slots"], mesh: jax.sharding.Mesh) -> tuple[PyTree, PyTree] | None:
        inner, outer = (fetched(level, index, mesh) for level in (self._data.inner, self._data.outer))
        return None if inner is None or outer is None else (inner, outer)

    def _keep(self, index: Int[Array, " cohort"], present: Bool[Array, " cohort"] | None, states: PyTree) -> None:
        """The new states of those of a cohort who are present (None: all)."""
        if isinstance(self.client_state, Filed):
            here = jnp.ones(index.shape, bool) if present is None else present
            self.client_state = self.client_state.write(index, here, states)
            return
        to = index if present is None else jnp.where(present, index, self.clients)  # out of range: dropped
        put = lambda all, new: all.at[to].set(self._after(new.astype(all.dtype), all, index), mode="drop")
        self.client_state = jax.tree.map(put, self.client_state, states)

    def _after(self, new: Array, all: Array, index: Int[Array, " cohort"]) -> Array:
        """`new`, as a value that XLA knows only once it has read what stood in its place.

        Else it might write clients' states before it has read them, and to be safe copies all of them in every iteration.
        """
        old = jax.vmap(lambda i: entry(all, i))(index)
        always = jnp.asarray(self._dropout) < 2  # a probability, of which the compiler knows nothing
        return jnp.where(always, new, old)


@dataclasses.dataclass(frozen=True)
class _Known:
    """Features of a cohort's inner rows, once for all exchanges that ask it.

    Attributes:
        each: whether `features` are those of each client; else of all in one buffer, each from `base` on.
    """

    cohort: Int[Array, " cohort"]
    features: PyTree
    base: Int[Array, " cohort"] | None
    each: bool
