"""What clients measure for the steps that are found while an algorithm runs."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Float, PyTree

from ..algorithm import Component
from ..federation import Client
from .curvature import AutoStep

Scalar = Float[Array, ""]


class Seen(eqx.Module):
    """What was measured: M, L, the mean of d_y f and of f, and of how long clients' hypergradients are about."""

    largest: Scalar
    mean: Scalar
    pull: PyTree
    loss: Scalar
    steepest: Scalar


class Meter(Component):
    """What clients measure.

    Args:
        step: whose curvature.
        upper: whether x is paced too.
    """

    step: AutoStep
    upper: bool = eqx.field(default=True, static=True)

    def begin(self, client: Client, x: PyTree, y: PyTree) -> tuple[Scalar, Scalar, PyTree, Scalar, Scalar]:
        """The curvature twice, d_y f_i, f_i and about |h_i|: with v = d_y f_i / curvature, one term of the series."""
        curved, again, pull, loss = self.curvature(client, x, y)
        if not self.upper:
            return curved, again, pull, loss, loss
        problem, size = client.problem, self.step.batch_size
        inner, far = client.batch("inner", size), client.batch("outer", size)
        v = optax.tree.scale(1 / jnp.where(curved > 0, curved, 1), pull)
        direct, _ = problem.outer_gradients(x, y, far)
        along = optax.tree.sub(direct, problem.cross_vector(x, y, v, inner))
        return curved, again, pull, loss, optax.tree.norm(along)

    def curvature(self, client: Client, x: PyTree, y: PyTree) -> tuple[Scalar, Scalar, PyTree, Scalar]:
        """The largest curvature of g_i, twice, d_y f_i and f_i."""
        curved = self.step.largest_curvature(client, x, y)
        if not self.upper:
            return curved, curved, jnp.zeros_like(curved), jnp.zeros_like(curved)
        own, far = self.step.own_lower, client.batch("outer", self.step.batch_size)
        y = y if own is None else own(client.state)
        pull = client.problem.outer_gradients(x, y, far)[1]
        return curved, curved, pull, client.problem.outer_value(x, y, far)
