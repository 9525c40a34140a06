"""Full batches of clients that differ much in size, block by block of rows.

A full batch that is padded to the largest client costs (clients at a time) x (rows of the largest). An oracle is a
weighted mean over rows, and so are its derivatives: where padding would cost much more than the rows do, it is summed
over blocks of rows instead. For one client that is a loop over its blocks. For many at a time (`jax.vmap`) it is ONE loop
over the blocks of all of them, some in each turn, which adds each to what its client has: work as the sum of their
blocks, memory as one turn.

`Sizes` says what there is to choose from, of a level's clients; `Cut` is the choice for so many of them at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from .arrays import entry

TURN = 1024  # rows of one turn of the loop: bounds its memory
SPARE = 2**14  # rows of padding that are cheaper than a loop is to compile
_EACH = 16  # what a block costs beside its rows, in rows
_SIZES = tuple(2**k for k in range(8))
_ROOM = 32  # a buffer of features may have so many times the rows that are expected

# (args, examples, weights, features, which of the client's they are) -> the weighted mean over these rows
Part: TypeAlias = Callable[..., PyTree]


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the full batches of some clients at a time are cut.

    Attributes:
        size: rows of a block.
        capacity: blocks that they may have together; 0: their features are not kept.
    """

    size: int
    capacity: int

    @property
    def together(self) -> int:
        """Blocks in one turn."""
        return max(1, TURN // self.size)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How the rows of a level lie on its clients, where that is uneven.

    Attributes:
        clients, total, most: how many clients and rows there are, and rows of the largest client.
        size: rows of a block.
        reach: how many blocks the largest 1, 2, 4, ... clients have together, at last all.
    """

    clients: int
    total: int
    most: int
    size: int
    reach: tuple[int, ...]

    @classmethod
    def of(cls, counts: Int[np.ndarray, " clients"]) -> Sizes | None:
        """Of clients with so many rows each; None where padding is cheap, whatever is asked of how many of them."""
        counts = np.asarray(counts, np.int64)
        total, most = int(counts.sum()), int(counts.max())
        if not _uneven(len(counts) * most, total):
            return None
        cost = lambda size: int((-(-counts // size)).sum()) * (size + _EACH)
        size = min(_SIZES, key=cost)
        blocks = np.cumsum(np.sort(-(-counts // size))[::-1])
        places = [min(2**k, len(counts)) for k in range((len(counts) - 1).bit_length() + 1)]
        return cls(len(counts), total, most, size, tuple(int(blocks[n - 1]) for n in places))

    def cut(self, at_once: int, keeps: bool = True) -> Cut | None:
        """For full batches of so many clients at once; None where padding them is cheap.

        Args:
            keeps: whether features may be kept: not where a client may be among them several times.
        """
        expected = at_once * self.total / self.clients
        if not _uneven(at_once * self.most, expected):
            return None
        among = min(max(at_once - 1, 0).bit_length(), len(self.reach) - 1)
        capacity = self.reach[among] if keeps else 0
        return Cut(self.size, capacity if capacity * self.size <= _ROOM * expected else 0)


def _uneven(padded: float, real: float) -> bool:
    return padded > 2 * real and padded - real > SPARE


class Window(eqx.Module):
    """A client's rows as its blocks are cut out of them.

    Attributes:
        rows: pytree of arrays (total, ...), of which the client's are `offset : offset + count`.
        scale: () what the rows' weights sum to.
        cut: how they are cut.
        features: leaves (rows of features, ...), of which the client's begin at `base`; or None.
    """

    rows: PyTree[Shaped[Array, "total ..."]]
    offset: Int[Array, " *slots"]
    count: Int[Array, " *slots"]
    scale: Float[Array, " *slots"]
    cut: Cut = eqx.field(static=True)
    features: PyTree = None
    base: Int[Array, " *slots"] | None = None

    @property
    def blocks(self) -> Int[Array, " *slots"]:
        """How many blocks."""
        return -(-self.count // self.cut.size)

    def block(
        self, number: Int[Array, ""]
    ) -> tuple[PyTree, Float[Array, " rows"], Float[Array, ""], PyTree, Int[Array, " rows"]]:
        """(Examples, weights, the share of all rows that they are, features, place); padding repeats a real row."""
        first = number * self.cut.size
        place = first + jnp.arange(self.cut.size, dtype=jnp.int32)
        inside = jnp.minimum(place, self.count - 1)
        here = jnp.minimum(self.count - first, self.cut.size).astype(self.scale.dtype)
        weights = jnp.where(place < self.count, self.scale / here, 0.0)
        take = lambda start: lambda leaf: entry(leaf, start + inside)
        features = None if self.features is None else jax.tree.map(take(self.base), self.features)
        examples = jax.tree.map(take(self.offset), self.rows)
        return examples, weights, here / self.count.astype(here.dtype), features, inside


def summed(part: Part, args: PyTree, window: Window) -> PyTree:
    """The weighted mean over a client's rows: `part(args, examples, weights, features, place)` over its blocks.

    Args:
        part: its result is the weighted mean over the rows it is given, with weights that sum to the same for any.
    """

    @custom_vmap
    def one(args: PyTree, window: Window) -> PyTree:
        return _first(_sum(part, args, _like(False, args), _slots(window, 1)))

    @one.def_vmap
    def _(slots: int, batched: list, args: PyTree, window: Window) -> tuple[PyTree, PyTree]:
        of_args, of_window = batched
        if _apart(of_window):
            alone = lambda args, window: _first(_sum(part, args, _like(False, args), _slots(window, 1)))
            out = jax.vmap(alone, in_axes=_axes(batched))(args, window)
        elif not any(jax.tree.leaves(of_window)):  # the same rows: several sums over one client
            side_by_side = lambda args, *block: jax.vmap(lambda a: part(a, *block), in_axes=(_axes(of_args),))(args)
            out = summed(side_by_side, args, window)
        else:
            out = _sum(part, args, of_args, _slots(window, slots, of_window))
        return out, _like(True, out)

    return one(args, window)


def filled(part: Part, args: PyTree, window: Window) -> tuple[PyTree, Int[Array, ""]]:
    """(`part(args, examples)` of all rows, leaves (capacity x size, ...), where in them the client's begin).

    For many clients at a time they lie in one buffer.
    """

    def alone(args: PyTree, window: Window) -> tuple[PyTree, Int[Array, ""]]:
        found, base = _fill(part, args, _like(False, args), _slots(window, 1))
        return found, base[0]

    one = custom_vmap(alone)

    @one.def_vmap
    def _(slots: int, batched: list, args: PyTree, window: Window) -> tuple[PyTree, PyTree]:
        of_args, of_window = batched
        if _apart(of_window) or not any(jax.tree.leaves(of_window)):
            out = jax.vmap(alone, in_axes=_axes(batched))(args, window)
            return out, _like(True, out)
        out = _fill(part, args, of_args, _slots(window, slots, of_window))
        return out, (_like(False, out[0]), True)

    return one(args, window)


# The loop over the blocks of all slots ----------------------------------------------------------------------------------


class _Pairs(eqx.Module):
    """The blocks of all slots, one list.

    Attributes:
        window: leaves (slots,) where slots differ.
        ends: (slots,) where in the list each slot's blocks end.
    """

    window: Window
    ends: Int[Array, " slots"]

    def pick(
        self, pair: Int[Array, ""], args: PyTree, batched: PyTree
    ) -> tuple[Int[Array, ""], Bool[Array, ""], PyTree, tuple]:
        """(Slot, whether there is such a pair, the slot's args, its block)."""
        real = pair < self.ends[-1]
        slots = self.ends.shape[0]
        slot = jnp.minimum(jnp.searchsorted(self.ends, pair, side="right").astype(jnp.int32), slots - 1)
        window = _window_of(self.window, slot)
        number = jnp.where(real, pair - (self.ends[slot] - window.blocks), 0)
        own = jax.tree.map(lambda leaf, each: entry(leaf, slot) if each else leaf, args, batched)
        return slot, real, own, window.block(number)


def _sum(part: Part, args: PyTree, batched: PyTree, window: Window) -> PyTree:
    """Of each slot, leaves (slots, ...)."""
    pairs = _Pairs(window, jnp.cumsum(window.blocks, dtype=jnp.int32))
    turn = _turn(part, batched)
    shapes = jax.eval_shape(turn, pairs, args, jnp.zeros((), jnp.int32))[1]
    out = jax.tree.map(lambda s: jnp.zeros((window.count.shape[0], *s.shape[1:]), s.dtype), shapes)
    turns = _common(-(-pairs.ends[-1] // window.cut.together))
    return jax.lax.fori_loop(0, turns, lambda k, out: _added(out, *turn(pairs, args, k)), out)


@custom_vmap
def _common(turns: Int[Array, ""]) -> Int[Array, ""]:
    """As many for all loops that run side by side (on the devices of a mesh): JAX copies what ended early in each turn."""
    return turns


@_common.def_vmap
def _(size: int, batched: list, turns: Int[Array, " size"]) -> tuple[Int[Array, ""], bool]:
    return _common(jnp.max(turns)), False


def _turn(part: Part, batched: PyTree) -> Callable[..., tuple[Int[Array, " blocks"], PyTree]]:
    """(pairs, args, k) -> (slots, what each block adds to them) of the blocks of turn k."""

    @jax.jit  # traced once, for the shapes and for the loop
    def turn(pairs: _Pairs, args: PyTree, k: Int[Array, ""]) -> tuple[Int[Array, " blocks"], PyTree]:
        def one(pair: Int[Array, ""]) -> tuple[Int[Array, ""], PyTree]:
            slot, real, own, (examples, weights, share, features, place) = pairs.pick(pair, args, batched)
            share = jnp.where(real, share, 0.0)
            found = part(own, examples, weights, features, place)
            return slot, jax.tree.map(lambda leaf: leaf * share.astype(leaf.dtype), found)

        return jax.vmap(one)(_numbers(pairs.window.cut, k))

    return turn


def _fill(part: Part, args: PyTree, batched: PyTree, window: Window) -> tuple[PyTree, Int[Array, " slots"]]:
    """`filled` for all slots."""
    cut = window.cut
    pairs = _Pairs(window, jnp.cumsum(window.blocks, dtype=jnp.int32))

    @jax.jit
    def turn(pairs: _Pairs, args: PyTree, k: Int[Array, ""]) -> PyTree:
        def one(pair: Int[Array, ""]) -> PyTree:
            _, _, own, (examples, *_) = pairs.pick(pair, args, batched)
            return part(own, examples)

        found = jax.vmap(one)(_numbers(cut, k))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)

    shapes = jax.eval_shape(turn, pairs, args, jnp.zeros((), jnp.int32))
    turns, rows = -(-cut.capacity // cut.together), cut.together * cut.size
    out = jax.tree.map(lambda s: jnp.zeros((turns * rows, *s.shape[1:]), s.dtype), shapes)

    def write(k: Int[Array, ""], out: PyTree) -> PyTree:
        put = lambda all, new: jax.lax.dynamic_update_slice_in_dim(all, new, k * rows, 0)
        return jax.tree.map(put, out, turn(pairs, args, k))

    out = jax.lax.fori_loop(0, _common(-(-pairs.ends[-1] // cut.together)), write, out)
    return out, (pairs.ends - window.blocks) * cut.size


def _numbers(cut: Cut, k: Int[Array, ""]) -> Int[Array, " blocks"]:
    return k * cut.together + jnp.arange(cut.together, dtype=jnp.int32)


def _added(out: PyTree, slot: Int[Array, " blocks"], found: PyTree) -> PyTree:
    return jax.tree.map(lambda all, new: all.at[slot].add(new, mode="promise_in_bounds"), out, found)


# Windows of several slots -----------------------------------------------------------------------------------------------


def _each(window: Window) -> Window:
    """Whether leaves are those of each slot."""
    shared = ("rows", "features")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].name not in shared, window)


def _slots(window: Window, slots: int, batched: Window | None = None) -> Window:
    """The window of so many slots: what describes a client has leaves (slots,)."""
    wide = lambda leaf, has: leaf if has else jnp.broadcast_to(leaf, (slots, *leaf.shape))
    has = _like(False, window) if batched is None else batched
    spread = jax.tree.map(lambda leaf, here, each: wide(leaf, here) if each else leaf, window, has, _each(window))
    return spread


def _window_of(window: Window, slot: Int[Array, ""]) -> Window:
    return jax.tree.map(lambda leaf, each: entry(leaf, slot) if each else leaf, window, _each(window))


def _apart(batched: Window) -> bool:
    """Whether slots have arrays of their own, of which no loop over all can be made."""
    return any(jax.tree.leaves((batched.rows, batched.features)))


def _axes(batched: PyTree) -> PyTree:
    return tuple(jax.tree.map(lambda each: 0 if each else None, tree) for tree in batched)


def _first(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _like(value: bool, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda _: value, tree)
