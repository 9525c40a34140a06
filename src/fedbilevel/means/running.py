"""The means that the server knows, from what clients say of theirs.

    M <- M + a (m - M),   m the mean of the clients that answered an exchange, at its x and y

    a = max(s, 1/50, 1/(k+1)), k how many exchanges M has seen, s the share of all clients (by
        weight) that answered; a tenth of it where they took a minibatch

With everybody and all rows a = 1, and M is the mean of all at the x and y of the last exchange. Else
M is a running mean over about 1/s exchanges, so over as many clients as there are, and at first the
plain mean of all exchanges. It begins with everybody's means over all rows, so that no denominator
is zero because a group was not drawn.

Then F'(M) has a bias. Where M has the mean mu and the variance V, the mean of F'(M) is about
F'(mu) + F'''(mu) V / 2, and V is about a / (2 - a) of the variance of one exchange's m. And M lags
behind by what x and y moved in 1/a exchanges, which is nothing where they stand still. Both are
measured on the page "Outer losses of means".
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

LEAST = 0.02  # of an exchange, in the running mean
SAMPLED = 0.1  # of it, where rows are sampled


class Running(eqx.Module):
    """What is known of the means.

    Attributes:
        means: M, like what `Problem.outer_means` returns, in floating point.
        seen: k, () int32: how many exchanges are in it; with none it is zeros, and nothing is known.
    """

    means: PyTree
    seen: Int[Array, ""]

    @classmethod
    def none(cls, like: PyTree) -> Running:
        """Nothing known."""
        return cls(jax.tree.map(jnp.zeros_like, like), jnp.zeros((), jnp.int32))

    def begun(self, means: PyTree) -> Running:
        """What everybody said, over all rows."""
        return Running(means, jnp.ones((), jnp.int32))

    def renewed(
        self, means: PyTree, share: float | Float[Array, ""], sampled: bool, told: bool | Bool[Array, ""]
    ) -> Running:
        """After an exchange.

        Args:
            means: m.
            share: s.
            sampled: whether the clients took minibatches.
            told: whether they said anything of their means.
        """
        share = jnp.asarray(share) * (SAMPLED if sampled else 1.0)
        first = 1 / (self.seen.astype(share.dtype) + 1)
        a = jnp.where(told, jnp.minimum(jnp.maximum(jnp.maximum(share, LEAST), first), 1), 0)
        a = jnp.where(jnp.abs(1 - a) < 1e-5, 1, a)  # a sum of weights, rounded
        mix = lambda old, new: jnp.where(told, old + a.astype(old.dtype) * (new - old), old)
        return Running(jax.tree.map(mix, self.means, means), self.seen + jnp.asarray(told, jnp.int32))
