"""Checkpoints of formats 1 and 2, in which a state of ours was x, y and a dict of what else it held.

Dicts are written by sorted names, modules in the order of their fields: the arrays are the same, in another order.
"""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from .. import arrays

TYPED = 3  # the first format in which states are modules with named fields
_OURS = "fedbilevel.algorithms."


def reordered(like: PyTree, found: list[np.ndarray], number: int) -> list[np.ndarray]:
    """The arrays of a part in the order of today's `like`, from the order that format `number` wrote them in.

    Raises:
        ValueError: they are more or fewer than `like` has.
    """
    leaves, structure = jax.tree.flatten(like)
    if number >= TYPED or not all(leaf is each for leaf, each in zip(leaves, arrays.leaves_of(like), strict=True)):
        return found
    then = jax.tree.leaves(_as_then(jax.tree.unflatten(structure, range(len(leaves)))))
    if len(found) != len(then):
        raise ValueError(f"{len(found)} arrays where {len(then)} belong")
    back = dict(zip(then, found, strict=True))
    return [back[place] for place in range(len(leaves))]


def _as_then(tree: PyTree) -> PyTree:
    """The tree with x, y and a dict where a state of ours is, and dicts where its modules are."""
    ours = lambda node: isinstance(node, eqx.Module) and type(node).__module__.startswith(_OURS)

    def turned(node: PyTree) -> PyTree:
        if not ours(node):
            return node
        named = {field.name: _as_then(getattr(node, field.name)) for field in dataclasses.fields(node)}
        if not {"x", "y"} <= set(named):
            return named
        return named.pop("x"), named.pop("y"), named

    return jax.tree.map(turned, tree, is_leaf=ours)
