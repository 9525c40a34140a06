"""MemFBO: SimFBO by first-order oracles only. One round an iteration.

After an AAAI 2025 paper on memory-efficient federated bilevel optimisation, and Yang, Xiao & Ji, "SimFBO", NeurIPS 2023,
arXiv 2305.19442. The update is REMEMBERED, not verified. With

    D_i(z) = ( d_x f_i - J_i v,   d_y g_i,   H_i v - d_y f_i )        at z = (x, y, v)

in which H_i v and J_i v are central differences of d_y g_i and d_x g_i between y + d v and y - d v, |d v| = `distance`:

    moves      z_i = z, tau_i times  z_i -= (outer_lr, inner_lr, hessian_lr) D_i(z_i)           up z_i - z
    server     z += server_lr mean (z_i - z),   then v is projected on |v| <= radius, where that is given

The error of the differences is of the order distance^2 (third derivatives), and rounding over distance. All else is as in
`simfbo`, the floor and the weight of clients with more local steps too.

Floats per client and round: down dx + 2 dy, up dx + 2 dy.
"""

from __future__ import annotations

from typing import ClassVar, final

import jax.numpy as jnp
import optax.tree
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from .. import algorithm
from ..algorithm import About, Algorithm, Info, choice, component, count, rate
from ..federation import Federation
from ..pace.curvature import AutoStep, Curvature, Rate
from .components.directions import first_order_direction
from .components.simultaneous import LocalRounds, as_counts, check_client_steps, projected
from .components.steps import norm


class State(algorithm.State):
    """z = (x, y, v).

    Attributes:
        v: the adjoint, like y.
        pull: |d_y f| of the first iteration, to which the residual of v is compared.
        curvature: what `hessian_lr="auto"` remembers.
    """

    v: PyTree
    pull: Float[Array, ""]
    curvature: Curvature | None


@final
class MemFBO(Algorithm):
    """MemFBO (AAAI 2025; update remembered): SimFBO without second derivatives.

    Args:
        distance: how far the central differences reach to either side, |d v|.

    The other arguments are `SimFBO`'s.
    """

    about: ClassVar[About] = About(
        name="memfbo",
        rounds="1",
        when="as simfbo, where there are no second derivatives",
        hypergradient="as SimFBO's, by first-order oracles only",
        lower="at y* with one local step; else beside it",
        order="first",
        busy={"client_steps": (1, 2, 3, 1, 2, 3, 1, 2), "radius": 3.0},
    )

    hessian_lr: Rate | str = rate("auto", "auto")
    batch_size: int | None = count(None)
    inner_lr: Rate | str = rate("auto", "auto")
    local_steps: int = count(5)
    outer_lr: Rate | str = rate("auto", "auto")
    server_lr: Rate = rate(1.0)
    radius: Rate | None = rate(None)
    client_steps: tuple[int, ...] | None = choice(None, as_counts)
    distance: Rate = rate(0.01)

    def __check_init__(self):
        check_client_steps("MemFBO", self.client_steps)

    @component
    def hessian(self) -> AutoStep:
        """The step of v: from single clients' curvature, where one of them takes several steps between two means."""
        several = max(self.client_steps or (self.local_steps,)) > 1
        return AutoStep(self.hessian_lr, self.batch_size, several)

    @component
    def rounds(self) -> LocalRounds:
        """The clients' local steps."""
        differences = Partial(first_order_direction, distance=self.distance)
        return LocalRounds(
            self.hessian,
            differences,
            self.outer_lr,
            self.inner_lr,
            self.local_steps,
            self.batch_size,
            self.client_steps,
        )

    @property
    def spares_unasked(self) -> bool:
        return self.radius is None

    def init(self, x: PyTree, y: PyTree) -> State:
        return State(x, y, optax.tree.zeros_like(y), jnp.zeros_like(norm(y)), self.hessian.begin(y))

    def step(self, fed: Federation, state: State) -> tuple[State, Info]:
        check_client_steps("MemFBO", self.client_steps, fed.clients)
        lam, memory = self.hessian.ask(fed, state.x, state.y, state.curvature)
        z = state.x, state.y, state.v
        moved = fed.average(self.rounds.moves, *z, lam)
        x, y, v = optax.tree.add_scale(z, self.server_lr, moved)
        v = projected(v, self.radius)
        info, pull = self.rounds.told(moved, lam, state.pull)
        return State(x, y, v, pull, self.hessian.watch(memory, v)), info
