"""ShroFBO: SimFBO in which clients that take more local steps do not count more. One round an iteration.

After Yang, Xiao & Ji, "SimFBO: Towards Simple, Flexible and Communication-efficient Federated Bilevel Optimization",
NeurIPS 2023, arXiv 2305.19442. One round an iteration is published; the update is REMEMBERED, not verified. With

    D_i(z) = ( d_x f_i - d2_xy g_i v,   d_y g_i,   d2_yy g_i v - d_y f_i )        at z = (x, y, v)

    normalised   z_i = z, tau_i times  z_i -= (outer_lr, inner_lr, hessian_lr) D_i(z_i)     up (z_i - z) / tau_i and tau_i
    server       z += server_lr mean (tau_i) mean ((z_i - z) / tau_i),
                 then v is projected on |v| <= radius, where that is given

The fixed point is where mean_i (sum_k D_i(z_i^k) / tau_i) = 0: the solution with one local step, and with more beside it,
by the order of the steps, where clients differ. With tiny steps it goes to the solution, however unequal the tau_i are.

Floats per client and round: down dx + 2 dy, up dx + 2 dy + 1.
"""

from __future__ import annotations

from typing import ClassVar, final

import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Float, PyTree

from .. import algorithm
from ..algorithm import About, Algorithm, Info, choice, component, count, rate
from ..federation import Client, Federation
from ..pace.curvature import AutoStep, Curvature, Rate
from .components.directions import direction
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
class ShroFBO(Algorithm):
    """ShroFBO (NeurIPS 2023; update remembered): SimFBO in which clients with more local steps do not count more.

    The arguments are `SimFBO`'s.
    """

    about: ClassVar[About] = About(
        name="shrofbo",
        rounds="1",
        when="as simfbo, where clients take unequal numbers of local steps",
        hypergradient="right with one local step; else off by the order of the steps",
        lower="at y* with one local step; else beside it",
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

    def __check_init__(self):
        check_client_steps("ShroFBO", self.client_steps)

    @component
    def hessian(self) -> AutoStep:
        """The step of v: from single clients' curvature, where one of them takes several steps between two means."""
        several = max(self.client_steps or (self.local_steps,)) > 1
        return AutoStep(self.hessian_lr, self.batch_size, several)

    @component
    def rounds(self) -> LocalRounds:
        """The clients' local steps."""
        return LocalRounds(
            self.hessian,
            direction,
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
        check_client_steps("ShroFBO", self.client_steps, fed.clients)
        lam, memory = self.hessian.ask(fed, state.x, state.y, state.curvature)
        z = state.x, state.y, state.v
        a_step, steps = fed.average(self.normalised, *z, lam)
        moved = optax.tree.scale(steps, a_step)
        x, y, v = optax.tree.add_scale(z, self.server_lr, moved)
        v = projected(v, self.radius)
        info, pull = self.rounds.told(moved, lam, state.pull)
        return State(x, y, v, pull, self.hessian.watch(memory, v)), info

    def normalised(
        self, client: Client, x: PyTree, y: PyTree, v: PyTree, lam: Float[Array, ""] | None
    ) -> tuple[PyTree, Float[Array, ""]]:
        """How far a local step goes on average, and how many there are."""
        steps = jnp.asarray(self.rounds.steps(client), norm(y).dtype)
        return optax.tree.scale(1 / steps, self.rounds.moves(client, x, y, v, lam)), steps
