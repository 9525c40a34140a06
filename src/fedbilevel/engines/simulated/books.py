"""What iterations of a compiled chunk leave behind, in as few buffers as there are types of numbers."""

from __future__ import annotations

import jax
from jaxtyping import Array, PyTree

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

    def unpacked(self, buffers: dict[str, Array]) -> PyTree:
        """Of buffers of such rows, the tree with a leading axis."""
        cut = lambda leaf, kind, start: jax.lax.reshape(
            jax.lax.slice_in_dim(buffers[kind], start, start + leaf.size, axis=1), (CAPACITY, *leaf.shape)
        )
        leaves = [cut(leaf, *place) for leaf, place in zip(self._leaves, self._places, strict=True)]
        return jax.tree.unflatten(self._structure, leaves)
