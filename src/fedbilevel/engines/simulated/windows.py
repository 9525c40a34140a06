"""The blocks of those whom an iteration asks: of leaves that belong to clients (`owned`) all that it has to touch.

Whom the exchanges of an iteration ask is known before it begins (`draws`). Where these are few of all, their blocks are
taken out of the server's state, the server's program runs on these alone, and they are put back. So an iteration costs
what its cohorts have, not what all clients have. An algorithm has to say that it may be so (`Algorithm.spares_unasked`).
What is looked at of the whole state after each iteration is known from the largest number of each block.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from ... import owned
from ...algorithm import Algorithm
from ...arrays import entry
from ...owned import PerClient
from ...watch import BUCKETS, Seen, Vector, observe, signed
from .draws import Draws

SHARE = 0.5  # of all clients: so many places at most are few

Highs: TypeAlias = tuple[Float[Array, " clients"], ...]  # of each leaf that belongs to clients


def opens(asked: int, algorithm: Algorithm, state: PyTree, clients: int) -> bool:
    """Whether iterations touch no more than the blocks of those whom they ask.

    Args:
        asked: how many these are at most, each as often as it is asked; 0: that is not known.
    """
    blocks = owned.nodes(state)
    whole = all(node.value.shape[0] == clients and not (node.own or node.site) for node in blocks)
    return bool(blocks) and whole and 0 < asked <= SHARE * clients and algorithm.spares_unasked


@dataclasses.dataclass(frozen=True)
class Window:
    """Whose blocks are in it: a client that is asked several times has several places, of which the first counts.

    Attributes:
        draws: of the iteration's exchanges.
        clients: how many there are.
        asked: who has each place.
        place: where each client's block is; beyond the last place of those who are not asked.
    """

    draws: Draws
    clients: int
    asked: Int[Array, " places"]
    place: Int[Array, " clients"]

    @classmethod
    def of(cls, draws: Draws, clients: int) -> Window:
        """Of all whom an iteration may ask."""
        assert draws.cohorts is not None
        asked = draws.cohorts.reshape(-1)
        places = jnp.arange(asked.shape[0], dtype=jnp.int32)
        return cls(draws, clients, asked, jnp.full(clients, asked.shape[0], jnp.int32).at[asked].min(places))

    @property
    def places(self) -> int:
        """How many there are."""
        return self.asked.shape[0]

    @property
    def counts(self) -> Bool[Array, " places"]:
        """Whether a place is its client's first."""
        return entry(self.place, self.asked) == jnp.arange(self.places, dtype=jnp.int32)

    def cut(self, state: PyTree) -> PyTree:
        """A state with these blocks alone."""
        return owned.mapped(lambda node: _with(node, entry(node.value, self.asked)), state)

    def put_back(self, small: PyTree, state: PyTree, highs: Highs) -> tuple[PyTree, Highs]:
        """(`small`, with all clients' blocks: those of `state` where they are not in it; the largest number of each)."""
        to = jnp.where(self.counts, self.asked, self.clients)  # out of range: dropped
        put = lambda all, new: all.at[to].set(new.astype(all.dtype), mode="drop")
        whole = owned.mapped(lambda new, all: _with(all, put(all.value, new.value)), small, state)
        pairs = zip(owned.nodes(small), highs, strict=True)
        return whole, tuple(put(all, _high(node.value)) for node, all in pairs)

    def seen(self, before: PyTree, after: PyTree, bounds: PyTree) -> Seen:
        """What `observe` sees of the whole state.

        Args:
            before, after: with the blocks of this window.
            bounds: what `bounds` gives.
        """
        return observe(before, after, bounds=bounds, sketch=lambda moves: self._sketch(after.x, moves))

    def _sketch(self, x: PyTree, moves: list[Vector]) -> Float[Array, " 32"]:
        """That of the whole x, in which each block has its place."""
        sketch, first, left = jnp.zeros(BUCKETS, moves[0].dtype), 0, map(jnp.asarray, moves)
        for leaf in jax.tree.leaves(x, is_leaf=owned.is_block):
            if owned.is_block(leaf):
                wide = math.prod(leaf.value.shape[1:])
                rows = next(left).reshape(self.places, wide)
                sketch = sketch + _swept(rows, np.uint32(first) + np.uint32(wide) * self.asked.astype(jnp.uint32))
                first += wide * self.clients
            elif jnp.issubdtype(leaf.dtype, jnp.inexact):
                numbers = next(left)
                sketch = sketch + _swept(numbers[None], jnp.full(1, first, jnp.uint32))
                first += numbers.shape[0]
        return sketch


def _swept(rows: Float[Array, "rows wide"], first: UInt32[Array, " rows"]) -> Float[Array, " 32"]:
    """The sketch of rows of numbers, each of which begins at a place of its own."""
    count, wide = rows.shape
    rows = jnp.asarray(signed(rows, first[:, None] + np.arange(wide, dtype=np.uint32)[None]))
    folded = jnp.pad(rows, ((0, 0), (0, -wide % BUCKETS))).reshape(count, -(-wide // BUCKETS), BUCKETS).sum(axis=1)
    # those that begin in the same bucket together, then turned to where they begin
    begins = jax.nn.one_hot(first % np.uint32(BUCKETS), BUCKETS, axis=0, dtype=rows.dtype)
    alike = jnp.matmul(begins, folded, precision=jax.lax.Precision.HIGHEST)
    bucket = np.arange(BUCKETS)
    return alike[bucket[:, None], (bucket - bucket[:, None]) % BUCKETS].sum(axis=0)


def highest(state: PyTree) -> Highs:
    """The largest absolute value of each block."""
    return tuple(_high(node.value) for node in owned.nodes(state))


def bounds(state: PyTree, highs: Highs) -> PyTree:
    """A state in which the largest number of each block stands for the block."""
    each = iter(highs)
    return owned.mapped(lambda node: _with(node, next(each)), state)


def _high(blocks: Float[Array, "clients ..."]) -> Float[Array, " clients"]:
    return jnp.max(jnp.abs(blocks), axis=tuple(range(1, blocks.ndim)), initial=0)


def _with(node: PerClient, value: Array) -> PerClient:
    return node.holding(value)
