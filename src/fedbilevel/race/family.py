"""One algorithm with several settings, as one module of stacked numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from ..algorithm import Algorithm


class Family(eqx.Module):
    """One algorithm with several settings.

    Attributes:
        name: what it is called in the race.
        algorithm: every number of it with the axis of settings in front.
        size: how many settings there are.
    """

    name: str = eqx.field(static=True)
    algorithm: Algorithm
    size: int = eqx.field(static=True)

    @classmethod
    def of(cls, name: str, algorithms: Sequence[Algorithm]) -> Family:
        """Algorithms that differ in numbers alone."""
        return cls(
            name,
            jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(a) for a in leaves]), *algorithms),
            len(algorithms),
        )

    def each(self, function: Callable[..., PyTree], *stacked: PyTree) -> PyTree:
        """function(algorithm, ...) of every setting."""
        many = jnp.arange(self.size)  # there may be no number in it
        return jax.vmap(lambda _, algorithm, *rest: function(algorithm, *rest))(many, self.algorithm, *stacked)

    def only(self, places: Sequence[int]) -> Family:
        """With some of its settings."""
        return Family(self.name, taken(self.algorithm, places), len(places))

    def one(self, place: int) -> Algorithm:
        """One of its algorithms, as it runs alone."""
        return jax.tree.map(lambda leaf: leaf[place], self.algorithm)


def taken(tree: PyTree, places: Sequence[int] | Array | np.ndarray) -> PyTree:
    """Some entries of each leaf."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, jnp.asarray(places), 0), tree)


def where(good: Bool[Array, "*settings"], new: PyTree, old: PyTree) -> PyTree:
    """The new one where it is good, for each setting."""
    wide = lambda leaf: jnp.reshape(good, jnp.shape(good) + (1,) * (jnp.ndim(leaf) - jnp.ndim(good)))
    return jax.tree.map(lambda a, b: jnp.where(wide(a), a, b), new, old)
