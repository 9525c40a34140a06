"""What an iteration did to the server's state, measured there from the state before and the state after.

Nothing travels for it, and no algorithm knows of it: every engine calls `observe` once an iteration. How large each part
of the state is, and how far it moved, tells what blew up first; a sketch of the move of x tells whether x swings.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt32

from .owned import travelling

BUCKETS = 32  # numbers of a sketch; an x of no more numbers is sketched without loss

Number = Float[Array | np.ndarray, "*times"] | np.floating  # outside of compiled programs numpy's
Vector = Float[Array | np.ndarray, "_"]
Sketch = Float[Array | np.ndarray, "*times 32"]


class Seen(eqx.Module):
    """What was seen of an iteration; of several, with a leading axis.

    Attributes:
        sizes: by the name of a part of the state, the largest absolute value after the iteration.
        moves: the same of the difference to what was before it.
        sketch: (32,) the move of x, its numbers summed with fixed random signs in 32 places: angles between moves are kept,
            exactly where x has at most 32 numbers, about within 1/sqrt(32) beyond.
    """

    sizes: dict[str, Number]
    moves: dict[str, Number]
    sketch: Sketch


def attributes(state: PyTree) -> dict[str, PyTree]:
    """What a state holds, by name."""
    if dataclasses.is_dataclass(state):
        named = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
        kept = named.pop("kept", {})  # as states without types hold it, by name
        return named | (kept if isinstance(kept, dict) else {"kept": kept})
    return state._asdict() if hasattr(state, "_asdict") else {"x": state.x, "y": state.y}


def parts(state: PyTree) -> dict[str, PyTree]:
    """The parts of a state by name: x, y, and what else it holds, each entry of a dict and of a tuple on its own.

    What is made like x or y is one part, whatever it is made of.
    """
    held = attributes(state)
    whole = [jax.tree.structure(held[name]) for name in ("x", "y")]
    found: dict[str, PyTree] = {}
    for name, value in held.items():
        if jax.tree.structure(value) in whole:
            found[name] = value
        elif isinstance(value, dict):
            found |= {str(part): tree for part, tree in value.items()}
        elif type(value) is tuple and len(value) > 1:
            found |= {f"{name}.{k}": piece for k, piece in enumerate(value)}
        else:
            found[name] = value
    return {name: tree for name, tree in found.items() if any(map(eqx.is_inexact_array, jax.tree.leaves(tree)))}


def observe(
    before: PyTree,
    after: PyTree,
    xp: ModuleType = jnp,
    bounds: PyTree = None,
    sketch: Callable[[list[Vector]], Sketch] | None = None,
) -> Seen:
    """What an iteration did. `xp` is `jnp` inside compiled programs, `np` outside them.

    Args:
        before, after: the states; or what of them may have changed, where the other two say what is true of the whole.
        bounds: like `after`, with the same largest numbers as the whole state; None: `after` is the whole state.
        sketch: makes the sketch of the move of x from its inexact leaves' flat moves; None: they are whole.
    """
    old, new = parts(before), parts(after)
    whole = new if bounds is None else parts(bounds)
    sizes = {name: _largest(_numbers(tree, xp), xp) for name, tree in whole.items()}
    pairs = {name: zip(_numbers(tree, xp), _numbers(old[name], xp), strict=True) for name, tree in new.items()}
    changes = {name: [b - a for b, a in pair] for name, pair in pairs.items()}
    moves = {name: _largest(change, xp) for name, change in changes.items()}
    return Seen(sizes, moves, _sketch(changes["x"], xp) if sketch is None else sketch(changes["x"]))


def _numbers(tree: PyTree, xp: ModuleType) -> list[Vector]:
    """The inexact leaves, flat, as ordinary floats; what is kept at the sites the server does not know."""
    wide = jax.dtypes.canonicalize_dtype(float)
    leaves = [leaf for leaf in jax.tree.leaves(travelling(tree)) if eqx.is_inexact_array(leaf)]
    return [xp.asarray(leaf).real.astype(wide).reshape(-1) for leaf in leaves]


def _largest(vectors: list[Vector], xp: ModuleType) -> Number:
    zero = xp.zeros((), jax.dtypes.canonicalize_dtype(float))
    return functools.reduce(xp.maximum, [xp.max(xp.abs(vector), initial=0) for vector in vectors], zero)


def _sketch(vectors: list[Vector], xp: ModuleType) -> Sketch:
    flat = xp.concatenate(vectors or [xp.zeros((0,), jax.dtypes.canonicalize_dtype(float))])
    flat = signed(flat, xp.arange(flat.shape[0], dtype=np.uint32), xp)
    padded = xp.concatenate([flat, xp.zeros((-flat.shape[0] % BUCKETS,), flat.dtype)])
    return xp.sum(padded.reshape(-1, BUCKETS), axis=0)


def signed(
    numbers: Float[Array | np.ndarray, "*numbers"], places: UInt32[Array | np.ndarray, "*numbers"], xp: ModuleType = jnp
) -> Float[Array | np.ndarray, "*numbers"]:
    """Numbers with the fixed random signs of their places in x."""
    mixed = places * np.uint32(2654435761)
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(2246822519)
    return xp.where((mixed >> np.uint32(13)) & np.uint32(1) == np.uint32(1), numbers, -numbers)


def precision(x: PyTree) -> float:
    """How far the number after one lies from one, in the coarsest of the dtypes in x."""
    leaves = [leaf for leaf in jax.tree.leaves(x) if eqx.is_inexact_array(leaf)]
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in leaves)
