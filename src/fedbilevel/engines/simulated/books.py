"""What iterations of a compiled chunk leave behind, in as few buffers as there are types of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ...protocol.sites import Path
from ...watch import observe

Layout: TypeAlias = tuple[tuple[Path, int], ...]
Shape: TypeAlias = jax.ShapeDtypeStruct | Array

CAPACITY = 256  # the most iterations of one compiled chunk: bounds its buffers of diagnostics


class Books:
    """What an iteration leaves behind, some dozens of numbers, as one row of a buffer for each dtype: a loop over dozens of
    buffers takes longer to compile.

    Attributes:
        sizes: by dtype, how many numbers.
    """

    def __init__(self, shapes: PyTree):
        self._leaves, self._structure = jax.tree.flatten(shapes)
        self.sizes: dict[str, int] = {}
        self._places: list[tuple[str, int]] = []
        for leaf in self._leaves:
            kind = str(leaf.dtype)
            start = self.sizes.get(kind, 0)
            self.sizes[kind] = start + leaf.size
            self._places.append((kind, start))

    def packed(self, tree: PyTree) -> dict[str, Array]:
        """The rows of one iteration."""
        parts: dict[str, list] = {kind: [] for kind in self.sizes}
        for leaf, (kind, _) in zip(jax.tree.leaves(tree), self._places, strict=True):
            parts[kind].append(jax.lax.reshape(leaf, (leaf.size,)))
        return {kind: jax.lax.concatenate(leaves, 0) for kind, leaves in parts.items()}

    def unpacked(self, buffers: Mapping[str, Array]) -> PyTree:
        """Of buffers of such rows, the tree with their leading axes, as numpy's: nothing is compiled for it."""
        held = {kind: np.asarray(buffer) for kind, buffer in buffers.items()}
        assert {kind: buffer.shape[-1] for kind, buffer in held.items()} == self.sizes, "other books than expected"

        def cut(leaf: Shape, kind: str, start: int) -> np.ndarray:
            buffer = held[kind]
            return buffer[..., start : start + leaf.size].reshape(*buffer.shape[:-1], *leaf.shape)

        leaves = [cut(leaf, *place) for leaf, place in zip(self._leaves, self._places, strict=True)]
        return jax.tree.unflatten(self._structure, leaves)


def expected(layout: Layout, drops: bool, info: PyTree, state: PyTree) -> Books:
    """The books of iterations: (counts by site, (diagnostics, what was seen of the state)).

    Args:
        layout: how many flags each site has.
        drops: whether replies are counted too.
        info: shapes of the diagnostics.
        state: of the server.
    """
    rows = (2,) if drops else ()
    counts = {path: jax.ShapeDtypeStruct((*rows, 1 + flags), np.int32) for path, flags in layout}
    return Books((counts, (jax.tree.map(_shape, info), jax.eval_shape(observe, state, state))))


def _shape(leaf: Shape | float | bool) -> Shape:
    """Of a diagnostic, which may be a number of Python's: it becomes an array on its way."""
    if isinstance(leaf, (bool, int, float)):
        return jax.ShapeDtypeStruct((), jnp.result_type(leaf))
    return leaf
