"""What x and y look like, known once and looked for at every call."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .errors import InputError, check
from .jaxprs import Tracer
from .problem import describe, strong
from .variables import trainable


class Template:
    """What x (or y) looks like: its structure, the shapes and dtypes of its floating-point arrays, and what else is in it.

    Args:
        arrays, rest: the two parts of a variable, as `trainable` splits it; no number of the arrays is kept.
        name: what the variable is called in messages: "x" or "y".
        owner: what takes variables that look like this: "the estimator".
    """

    def __init__(self, arrays: PyTree, rest: PyTree, name: str, owner: str):
        self._name, self._owner = name, owner
        found, self._whole = jax.tree_util.tree_flatten_with_path(eqx.combine(arrays, rest))
        self._bare = jax.tree.structure(arrays)
        self._where = [f"{name}{jax.tree_util.keystr(path)}" for path, _ in found]
        optimised = {path for path, _ in jax.tree_util.tree_flatten_with_path(arrays)[0]}
        moving = [path in optimised for path, _ in found]
        self._places = [place for place, moves in enumerate(moving) if moves]
        self._others = [(place, found[place][1]) for place, moves in enumerate(moving) if not moves]
        kinds = [(found[place][1].shape, found[place][1].dtype) for place in self._places]
        self._kinds = [jax.ShapeDtypeStruct(*kind) for kind in kinds]

    def split(self, variable: PyTree) -> tuple[PyTree, list[PyTree] | None]:
        """(The arrays of a variable that looks like this, its leaves); the leaves are None if it is those arrays alone.

        Arrays of JAX are looked at by shape and dtype only, so that nothing waits for them, and tracers are fine.

        Raises:
            InputError: it looks otherwise; or it is none of JAX's arrays, and not finite.
        """
        leaves, structure = jax.tree.flatten(variable)
        if structure == self._whole:
            self._check_others(leaves)
            moving, rest = [leaves[place] for place in self._places], leaves if self._others else None
        else:
            check(
                structure == self._bare,
                lambda: (
                    f"{self._name} has another structure than {self._owner} was bound to: it is {describe(variable)}, and "
                    f"was {self._described()}: pass one like that, or bind {self._owner} to the new one."
                ),
            )
            moving, rest = leaves, None
        for k, (leaf, kind) in enumerate(zip(moving, self._kinds, strict=True)):
            if not (_is_like(leaf, kind) and not leaf.weak_type):
                moving[k] = self._taken(leaf, self._where[self._places[k]], kind)
        return jax.tree.unflatten(self._bare, moving), rest

    def join(self, arrays: PyTree, leaves: list[PyTree] | None) -> PyTree:
        """A variable with these arrays, and the other leaves of one that was split; of None, the arrays alone."""
        if leaves is None:
            return arrays
        leaves = list(leaves)
        for place, leaf in zip(self._places, jax.tree.leaves(arrays), strict=True):
            leaves[place] = leaf
        return jax.tree.unflatten(self._whole, leaves)

    def check_finite(self, arrays: PyTree) -> None:
        """Refuse numbers that are not finite, with the leaf that holds them."""
        for place, leaf in zip(self._places, jax.tree.leaves(arrays), strict=True):
            trainable(leaf, self._where[place])

    def _taken(self, leaf: PyTree, where: str, kind: jax.ShapeDtypeStruct) -> jax.Array:
        """A leaf that is not yet as it was bound."""
        given = leaf if isinstance(leaf, jax.Array) else trainable(leaf, where)[0]
        check(
            _is_like(given, kind),
            lambda: (
                f"{where} is {describe(given)}, and {self._owner} was bound to {_shown(kind)}: pass one like that "
                f"(.astype for another dtype), or bind {self._owner} to the new one."
            ),
        )
        return strong(given)

    def _described(self) -> str:
        """Its shapes, in words."""
        leaves = dict(self._others) | dict(zip(self._places, self._kinds, strict=True))
        return _shown(jax.tree.unflatten(self._whole, [leaves[place] for place in sorted(leaves)]))

    def _check_others(self, leaves: list[PyTree]) -> None:
        """Refuse other values than those bound in what is no floating-point array."""
        for place, known in self._others:
            if leaves[place] is not known and not _same(leaves[place], known):
                raise InputError(
                    f"{self._where[place]} is {leaves[place]!r}, and {self._owner} was bound to {known!r}: what is no "
                    f"floating-point array stays as it was bound; bind {self._owner} to the new one."
                )


def _is_like(leaf: PyTree, kind: jax.ShapeDtypeStruct) -> bool:
    return isinstance(leaf, jax.Array) and leaf.shape == kind.shape and leaf.dtype == kind.dtype


def _shown(shapes: PyTree) -> str:
    """Shapes in one line: `{'w': f32[3], 'b': f32[]}`."""
    return " ".join(eqx.tree_pformat(shapes, struct_as_array=True, width=10_000).split())


def _same(one: PyTree, other: PyTree) -> bool:
    """Whether two leaves are equal; tracers are if their shapes and dtypes are."""
    if not (eqx.is_array_like(one) and eqx.is_array_like(other)):
        return type(one) is type(other) and bool(one == other)
    one, other = (leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for leaf in (one, other))
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if isinstance(one, Tracer):
        return True
    if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    return bool(np.array_equal(one, other))
