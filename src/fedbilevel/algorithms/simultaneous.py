"""What the methods share that move x, y and v = H^{-1} d_y f together by local steps, and average them once a round.

    D_i(z) = ( d_x f_i - d2_xy g_i v,   d_y g_i,   d2_yy g_i v - d_y f_i )        at z = (x, y, v)

The mean D over clients is zero at the solution: each factor is averaged before it is composed, for v and y are the same for
every client at the start of a round. Two or more uncorrected local steps pull z to where the mean of the clients' steps is
zero, which is beside the solution where clients differ, by the order of the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Int, PyTree

from ..algorithm import Info, State, count, rate
from ..federation import Client, Federation
from ..problem import Problem, Rows
from .components.directions import direction
from .components.steps import Gradient, local_descent, norm
from .curvature import AutoStep, keeping, residual


class Simultaneous(AutoStep):
    """x, y and v in one; a subclass says what a round is."""

    inner_lr: Any = rate(0.01)
    local_steps: int = count(5)
    hessian_lr: Any = rate(0.01, "auto")
    outer_lr: Any = rate(0.05)
    batch_size: int | None = count(None)

    def keeps(self, x, y):
        return super().keeps(x, y) | {"v": optax.tree.zeros_like(y), "pull": jnp.zeros_like(norm(y))}

    @property
    def local_factors(self):
        return self.local_steps > 1

    def rates(self, lam: Any) -> tuple[Any, Any, Any]:
        """The local steps of x, y and v."""
        return self.outer_lr, self.inner_lr, self.lam(lam)


def along(client: Client, batch_size: int | None, field: Callable = direction) -> Gradient:
    """s -> z -> D_i(z), each s on rows of its own; `field` is (problem, z, inner rows, outer rows) -> D_i(z)."""

    def on_rows(s):
        inner, outer = (client.batch(level, batch_size, s) for level in ("inner", "outer"))
        return lambda z: field(client.problem, z, inner, outer)

    return on_rows


def told(moved: PyTree, step: Any) -> Info:
    """The diagnostics of a round that moved x: the mean direction, from the step that all its local steps make."""
    size = norm(moved)
    return Info(size / step, jnp.zeros_like(size))


class LocalRounds(Simultaneous):
    """Rounds of plain local steps z_i <- z_i - (outer_lr, inner_lr, hessian_lr) D_i(z_i), whose ends are averaged."""

    def step(self, fed: Federation, state: State) -> tuple[State, Info]:
        lam, kept = self.hessian_step(fed, state)
        z = state.x, state.y, kept["v"]
        moved = self.moved(fed, z, lam)
        x, y, v = self.arrive(z, moved)
        # the mean directions, from the steps that all the local steps make
        h, q, w = (norm(part) / (rate * self.mean_steps) for part, rate in zip(moved, self.rates(lam), strict=True))
        lag, kept = residual(kept, w)
        return keeping(x, y, self.watch({**kept, "v": v})), Info(h, jnp.zeros_like(h), lag, q)

    def direction(self, problem: Problem, z: PyTree, inner: Rows, outer: Rows) -> PyTree:
        """D_i(z) on the rows."""
        return direction(problem, z, inner, outer)

    @property
    def mean_steps(self) -> Any:
        """Local steps of a round, on average over the clients."""
        return self.local_steps

    def steps(self, client: Client) -> Int[Array, ""] | int:
        """Local steps of this client."""
        return self.local_steps

    def moved(self, fed: Federation, z: PyTree, lam: Any) -> PyTree:
        """The mean over clients of how far they went."""
        return fed.average(self.moves, *z, lam)

    def arrive(self, z: PyTree, moved: PyTree) -> PyTree:
        """The next z at the server."""
        return optax.tree.add(z, moved)

    def moves(self, client: Client, x: PyTree, y: PyTree, v: PyTree, lam: Any) -> PyTree:
        """How far this client's local steps go from z."""
        z = x, y, v
        gradient = along(client, self.batch_size, self.direction)
        return optax.tree.sub(local_descent(gradient, z, self.rates(lam), self.steps(client)), z)
