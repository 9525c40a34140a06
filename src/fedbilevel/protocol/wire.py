"""Messages as bytes: the leaves of a pytree, one after the other, without their structure.

Both sides know the structure from the protocol trace (`Site.message`, `Site.reply`), so only numbers travel, and a
receiver never allocates what a sender claims: the expected length is known before the payload arrives. What is kept at the
sites (`owned.kept`) has no bytes.
"""

from __future__ import annotations

from typing import TypeGuard

import jax
import numpy as np
from jaxtyping import PyTree

from .. import owned
from ..errors import RunError
from ..federation import When

Leaf = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct


def encode(tree: PyTree, travels: tuple[bool, ...]) -> bytes:
    """The leaves' bytes in order; parts (`When` nodes, or reply parts paired with flags) that do not travel are left out."""
    return b"".join(np.asarray(leaf).tobytes() for leaf in _present(tree, travels))


def decode(schema: PyTree, payload: bytes, travels: tuple[bool, ...]) -> PyTree:
    """The pytree again, zeros for what did not travel; every leaf a numpy array of the schema's shape and dtype.

    Raises:
        RunError: the payload's length is not what the schema says.
    """
    present = _present(schema, travels)
    expected = sum(leaf.size * leaf.dtype.itemsize for leaf in present)
    if len(payload) != expected:
        raise RunError(f"a message of {len(payload)} bytes arrived where the protocol says {expected}.")
    arrays, start = {}, 0
    for leaf in present:
        stop = start + leaf.size * leaf.dtype.itemsize
        arrays[id(leaf)] = np.frombuffer(payload[start:stop], leaf.dtype).reshape(leaf.shape)
        start = stop
    return jax.tree.map(
        lambda leaf: arrays[id(leaf)] if id(leaf) in arrays else np.zeros(leaf.shape, leaf.dtype), schema
    )


def message_schema(message: PyTree, flags: tuple[bool, ...]) -> tuple[PyTree, tuple[bool, ...]]:
    """A message without its `When` wrappers, as a tuple of pieces, and whether each travels."""
    pieces, travels, flags_left = [], [], iter(flags)
    for piece in jax.tree.leaves(message, is_leaf=_is_piece):
        pieces.append(piece.value if _is_when(piece) else piece)
        travels.append(next(flags_left) if _is_when(piece) else True)
    return tuple(pieces), tuple(travels)


def conditional_parts(message: PyTree) -> int:
    """How many parts of a message travel only sometimes."""
    return sum(map(_is_when, jax.tree.leaves(message, is_leaf=_is_when)))


def rebuild_message(schema: PyTree, pieces: tuple, flags: tuple[bool, ...]) -> PyTree:
    """The message again from its pieces, `When` nodes with their flags."""
    flags_left = iter(flags)
    wrapped = [
        When(np.asarray(next(flags_left)), piece) if _is_when(node) else piece
        for node, piece in zip(jax.tree.leaves(schema, is_leaf=_is_piece), pieces, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(schema, is_leaf=_is_piece), wrapped)


def _is_when(node: PyTree) -> TypeGuard[When]:
    return isinstance(node, When)


def _is_piece(node: PyTree) -> bool:
    return _is_when(node) or owned.is_block(node)


def _present(parts: PyTree, travels: tuple[bool, ...]) -> list[Leaf]:
    return [leaf for part, here in zip(parts, travels, strict=True) if here for leaf in _sent(part)]


def _sent(part: PyTree) -> list[Leaf]:
    return jax.tree.leaves(owned.travelling(part))
