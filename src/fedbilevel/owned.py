"""Leaves of x and y that belong to the clients: each has a block of its own, and sees no other.

At the server such a leaf is a `PerClient` with all blocks, the clients first. What goes to a client is the same with its
own block alone, and so is its reply. The mean of such a reply is its owner's own: who else could say anything of it? So
an update acts on a block's own gradient, that of its client's loss. In the dense form (one common array, of which clients
index their row) the gradient of block i is p_i times that, with p_i the client's weight. Where both are zero is the same.

Blocks may be kept at the sites (`keep="site"`): then they travel in no direction. Each site runs what the server's program
does with its own (`protocol.at_sites`), and what the server holds in their place means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NoReturn, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree, Shaped

from .arrays import entry
from .errors import InputError, check
from .foreign import library_of


class PerClient(eqx.Module):
    """A leaf that belongs to the clients; made by `per_client`.

    Attributes:
        value: (clients, ...) their blocks; shorter ones end in zeros. Within a client, its own block.
        own: whether it is one client's block.
        lengths: of each block, (clients,) int32 as bytes; None where all are as long.
        site: whether blocks are kept at the sites, and never sent.
    """

    value: PyTree
    own: bool = eqx.field(static=True, default=False)
    lengths: bytes | None = eqx.field(static=True, default=None)
    site: bool = eqx.field(static=True, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all blocks."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> np.dtype:
        """Of the numbers."""
        return self.value.dtype

    def holding(self, value: PyTree, own: bool | None = None) -> PerClient:
        """The same leaf with other numbers: all blocks, or (`own`) one client's; None: as it is."""
        return PerClient(value, self.own if own is None else own, self.lengths, self.site)

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, client: int) -> Shaped[Array | np.ndarray, "*block"]:
        """One client's block, as it was given: without the zeros."""
        block = self.value[client]
        return block if self.lengths is None else block[: np.frombuffer(self.lengths, np.int32)[client]]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.value, dtype, copy=copy)

    @property
    def blocks(self) -> list[Shaped[Array | np.ndarray, "*block"]]:
        """Each client's block, as it was given."""
        return [self[client] for client in range(len(self))]


def per_client(blocks: PyTree, keep: Literal["server", "site"] = "server") -> PerClient:
    """A leaf of x or y of which every client has a block of its own: row weights, a head, a penalty.

    The losses of client i see its block alone, as an array without the clients' axis. It alone is sent to that client,
    and comes back. The result has all of them, as a `PerClient`: `leaf[i]` is client i's, `leaf.value` all.

    Args:
        blocks: floats, (clients, ...), in the order of the data's clients; or a list of one array a client, which
            may differ in their first axis. A shorter one ends in zeros up to the longest: its client's loss sees these, and
            so they travel; what it never reads stays zero.
        keep: "server" (it holds all blocks, and sends each client its own), or "site": a block is never sent, in neither
            direction, but is part of what its client keeps, and is saved and resumed there. The same numbers come of it. It
            needs an algorithm whose server does with a block what its site can do alone, with steps given as numbers; where
            clients are elsewhere, the result has a `KeptAtSites` in the leaf's place.

    Raises:
        InputError: blocks that are no floats, or differ in more than their first axis; another `keep`.
    """
    check(
        keep in ("server", "site"),
        f"per_client(keep=...) is 'server' or 'site', where the blocks are between rounds; got {keep!r}.",
    )
    site = keep == "site"
    check(
        not isinstance(blocks, Mapping),
        "per_client(...) takes a list of one array a client, in the order of data.names; got a mapping: pass "
        "[blocks[name] for name in data.names].",
    )
    if not isinstance(blocks, list | tuple):
        value = blocks if library_of(blocks) is not None or isinstance(blocks, jax.Array) else np.asarray(blocks)
        _check_floats(value, "per_client(...)")
        check(len(value.shape) >= 1, "per_client(...) takes an array whose first axis is the clients; got a number.")
        return PerClient(value, site=site)
    check(len(blocks) > 0, "per_client([...]) takes one array a client; got none.")
    own = [np.asarray(block) for block in blocks]
    for client, block in enumerate(own):
        _check_floats(block, f"per_client([...]) of client {client}")
        like = block.ndim == own[0].ndim and block.shape[1:] == own[0].shape[1:] and block.dtype == own[0].dtype
        check(
            like,
            f"per_client([...]) takes arrays that differ in their first axis alone; client {client}'s is "
            f"{block.dtype}{list(block.shape)} and client 0's {own[0].dtype}{list(own[0].shape)}.",
        )
    if own[0].ndim == 0 or len({len(block) for block in own}) == 1:
        return PerClient(np.stack(own), site=site)
    lengths = np.asarray([len(block) for block in own], np.int32)
    value = np.zeros((len(own), lengths.max(), *own[0].shape[1:]), own[0].dtype)
    for block, filled in zip(own, value, strict=True):
        filled[: len(block)] = block
    return PerClient(value, lengths=lengths.tobytes(), site=site)


def _check_floats(value: PyTree, what: str) -> None:
    kind = getattr(value, "dtype", None)
    floats = library_of(value) is not None or (kind is not None and jnp.issubdtype(kind, jnp.floating))
    check(floats, f"{what} takes floating-point numbers, which are optimised; got {kind}.")


# In pytrees ----------------------------------------------------------------------------------------------------------


def is_block(node: PyTree) -> TypeGuard[PerClient]:
    """Whether a node is a leaf that belongs to the clients."""
    return isinstance(node, PerClient)


def nodes(tree: PyTree) -> list[PerClient]:
    """All such leaves of a pytree."""
    return [node for node in jax.tree.leaves(tree, is_leaf=is_block) if is_block(node)]


def mapped(function: Callable[..., PyTree], tree: PyTree, *others: PyTree) -> PyTree:
    """The tree with `function(node, *the others' nodes)` in place of each such leaf; the rest is the first tree's."""
    each = lambda node, *other: function(node, *other) if is_block(node) else node
    return jax.tree.map(each, tree, *others, is_leaf=is_block)


def own(tree: PyTree, client: int | Int[Array, ""]) -> PyTree:
    """What one client has of it: its own blocks, and all else. Of shapes, their shapes."""

    def one(node: PerClient) -> PerClient:
        if node.own:
            return node
        value = node.value
        if isinstance(value, jax.ShapeDtypeStruct):
            return node.holding(jax.ShapeDtypeStruct(value.shape[1:], value.dtype), own=True)
        return node.holding(entry(value, client), own=True)

    return mapped(one, tree)


def bare(tree: PyTree) -> PyTree:
    """A client's tree as its losses see it: the blocks are arrays.

    Raises:
        InputError: it is no client's, but has all blocks.
    """

    def array(node: PerClient) -> PyTree:
        check(node.own, "a leaf per client was given to a loss with all clients' blocks: name the client.")
        return node.value

    return mapped(array, tree)


def unmarked(tree: PyTree) -> PyTree:
    """The arrays of all clients in place of the leaves that belong to them."""
    return mapped(lambda node: node.value, tree)


def without(tree: PyTree) -> PyTree:
    """The tree with None in place of such leaves."""
    return mapped(lambda node: None, tree)


def with_zeros(tree: PyTree) -> PyTree:
    """The tree with zeros in such leaves: they have no drift to correct."""
    return mapped(lambda node: node.holding(jnp.zeros_like(node.value)), tree)


def put(tree: PyTree, blocks: PyTree) -> PyTree:
    """The tree with the blocks of another one of its structure in such leaves."""
    return mapped(lambda node, other: other, tree, blocks)


def together(shared: PyTree, blocks: PyTree) -> PyTree:
    """A tree again, of what is in no block (None where one is) and a tree that has the blocks."""
    choose = lambda node, other: node if is_block(node) else other
    return jax.tree.map(choose, blocks, shared, is_leaf=lambda node: is_block(node) or node is None)


def collected(replies: PyTree, index: Int[Array, " n"], present: Bool[Array, " n"] | None, clients: int) -> PyTree:
    """All clients' blocks from those of some, leaves (n, ...): each owner's own, and zeros of those who did not answer."""
    to = index if present is None else jnp.where(present, index, clients)  # out of range: dropped

    def everybodys(node: PerClient) -> PerClient:
        zeros = jnp.zeros((clients, *node.value.shape[1:]), node.value.dtype)
        return node.holding(zeros.at[to].set(node.value, mode="drop"), own=False)

    return mapped(everybodys, replies)


def with_blocks(
    reply: PyTree, replies: PyTree, index: Int[Array, " n"], present: Bool[Array, " n"] | None, clients: int
) -> PyTree:
    """A combined reply, of all but the blocks, with all clients' blocks in it (`collected`)."""
    return together(reply, collected(replies, index, present, clients))


def added(replies: PyTree, index: Int[Array, " n"], clients: int) -> PyTree:
    """All clients' blocks, to which the parts of some are added: as derivatives of the dense form are."""

    def everybodys(node: PerClient) -> PerClient:
        zeros = jnp.zeros((clients, *node.value.shape[1:]), node.value.dtype)
        return node.holding(zeros.at[index].add(node.value), own=False)

    return mapped(everybodys, replies)


def answered(index: Int[Array, " n"], present: Bool[Array, " n"] | None, clients: int) -> Bool[Array, " clients"]:
    """Which of all clients answered."""
    to = index if present is None else jnp.where(present, index, clients)
    return jnp.zeros(clients, bool).at[to].set(True, mode="drop")


def chosen(flags: Bool[Array, " clients"], new: PyTree, old: PyTree) -> PyTree:
    """`new`, with the blocks of `old` where a client's flag is not set."""

    def block(node: PerClient, before: PerClient) -> PerClient:
        flag = flags.reshape(-1, *[1] * (node.value.ndim - 1))
        return node.holding(jnp.where(flag, node.value, before.value), own=False)

    return mapped(block, new, old)


# Kept at the sites ----------------------------------------------------------------------------------------------------


def kept(tree: PyTree) -> list[PerClient]:
    """The leaves of a pytree whose blocks are kept at the sites."""
    return [node for node in nodes(tree) if node.site]


def travelling(tree: PyTree) -> PyTree:
    """The tree with None in place of what is kept at the sites: what can be sent, and what the server knows."""
    return mapped(lambda node: None if node.site else node, tree)


def measured(tree: PyTree) -> PyTree:
    """The tree with no numbers in what is kept at the sites, for sizes of what the server knows."""
    return mapped(lambda node: node.holding(node.value.reshape(-1)[:0]) if node.site else node, tree)


def keeping(tree: PyTree, blocks: Sequence[PyTree]) -> PyTree:
    """The tree with these numbers in the leaves that are kept at the sites, in their order."""
    left = iter(blocks)
    return mapped(lambda node: node.holding(next(left)) if node.site else node, tree)


def alone(tree: PyTree, client: int) -> PyTree:
    """What is left where there is one client: all clients' blocks become its own, with their leading axis."""
    return mapped(lambda node: node if node.own else node.holding(node.value[client : client + 1]), tree)


def kept_alone(tree: PyTree, client: int) -> PyTree:
    """The arrays of one client's tree that are kept at the sites, without the zeros at a block's end; None elsewhere."""

    def block(node: PyTree) -> PyTree:
        if not (is_block(node) and node.site):
            return None
        ends = None if node.lengths is None else np.frombuffer(node.lengths, np.int32)[client]
        return node.value if ends is None else node.value[:ends]

    return jax.tree.map(block, tree, is_leaf=is_block)


class KeptAtSites:
    """What a result has in place of a leaf whose blocks are kept at the sites, where these are elsewhere.

    Whatever reads its numbers is refused: nobody here knows them.

    Attributes:
        clients: how many have a block.
    """

    def __init__(self, node: PerClient):
        self.clients, self._like = node.shape[0], f"{np.dtype(node.dtype)}{list(node.shape[1:])}"

    def __repr__(self) -> str:
        return f"<kept at the sites: {self.clients} clients' blocks of {self._like}>"

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise InputError(
            f"these blocks are kept at the sites ({self.clients} clients' of {self._like}), and nobody here knows them: "
            "each site has its own in blocks.npz of its folder; leave keep='site' out to have them here."
        )

    __array__ = __getitem__ = __len__ = __iter__ = _refuse
    value = blocks = property(_refuse)


def away(tree: PyTree) -> PyTree:
    """The tree with a `KeptAtSites` in place of each leaf that is kept at the sites."""
    return mapped(lambda node: KeptAtSites(node) if node.site else node, tree)


# Refused ----------------------------------------------------------------------------------------------------------------


def check_clients(tree: PyTree, name: str, clients: int) -> None:
    """Refuse leaves with blocks of another number of clients than there are.

    Raises:
        InputError: the leaf, and both numbers.
    """
    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_block)[0]:
        if is_block(node) and not node.own and node.value.shape[0] != clients:
            raise InputError(
                f"{name}{jax.tree_util.keystr(path)} has blocks of {node.value.shape[0]} clients, and the data has "
                f"{clients} clients: give one block to each, in the data's order."
            )


def beyond(tree: PyTree, name: str, clients: Sequence[str]) -> list[str]:
    """A sentence for each leaf of which a client's loss has moved numbers beyond its block's end: it was given too few."""
    found = []
    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_block)[0]:
        if not (is_block(node) and node.lengths is not None):
            continue
        lengths, value = np.frombuffer(node.lengths, np.int32), np.asarray(node.value)
        behind = np.arange(value.shape[1]) >= lengths[:, None]
        moved = behind & (value != 0).reshape(*value.shape[:2], -1).any(axis=2)
        if moved.any():
            client = int(np.flatnonzero(moved.any(axis=1))[0])
            found.append(
                f"the loss of {clients[client]} reads its block of {name}{jax.tree_util.keystr(path)} beyond the "
                f"{lengths[client]} entries that it has, which are zeros at first and were trained: give it as many as its "
                "rows ask for, or sum up no more than they read."
            )
    return found
