"""SimFBO: x, y and v move together by local steps; one round an iteration, a server step of its own.

After Yang, Xiao & Ji, "SimFBO: Towards Simple, Flexible and Communication-efficient Federated Bilevel Optimization",
NeurIPS 2023, arXiv 2305.19442. One round an iteration is published; the update is REMEMBERED, not verified. With

    D_i(z) = ( d_x f_i - d2_xy g_i v,   d_y g_i,   d2_yy g_i v - d_y f_i )        at z = (x, y, v)

    moves      z_i = z, tau_i times  z_i -= (outer_lr, inner_lr, hessian_lr) D_i(z_i)           up z_i - z
    server     z += server_lr mean (z_i - z),   then v is projected on |v| <= radius, where that is given

In the paper's letters: local steps eta_z, coefficients a_ik = 1, h_{z,i} = sum_k a_ik D_i, and gamma_z = server_lr eta_z.

The fixed point is where mean_i sum_k D_i(z_i^k) = 0. With one local step that is the solution. With tau >= 2 it is beside
it, by the order of the steps, where clients differ: no control variates. And with unequal tau_i (`client_steps`) clients
count in proportion to their steps: even with tiny steps the limit is the solution of the problem with weights tau_i / sum
tau. `ShroFBO` removes the latter; `MemFBO` asks for no second derivative.

Floats per client and round: down dx + 2 dy, up dx + 2 dy.
"""

from __future__ import annotations

from typing import ClassVar, final

import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Float, PyTree

from .. import algorithm
from ..algorithm import About, Algorithm, Info, choice, component, count, rate
from ..federation import Federation
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
class SimFBO(Algorithm):
    """SimFBO (NeurIPS 2023; update remembered): x, y, v in one round; a floor for two or more local steps.

    Args:
        inner_lr, hessian_lr, outer_lr: the step of ONE local step of y, of v and of x. `hessian_lr="auto"` measures the
            curvature (ours).
        local_steps: local steps a round.
        batch_size: rows of a minibatch, fresh for every local step; None for all rows.
        server_lr: the server's step along the mean of the clients' moves.
        radius: the largest |v|; None: any.
        client_steps: each client's number of local steps, in place of `local_steps`: a tuple with one for each client.
    """

    about: ClassVar[About] = About(
        name="simfbo",
        rounds="1",
        when="short messages, one local step; a floor for more",
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
        check_client_steps("SimFBO", self.client_steps)

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
        check_client_steps("SimFBO", self.client_steps, fed.clients)
        lam, memory = self.hessian.ask(fed, state.x, state.y, state.curvature)
        z = state.x, state.y, state.v
        moved = fed.average(self.rounds.moves, *z, lam)
        x, y, v = optax.tree.add_scale(z, self.server_lr, moved)
        v = projected(v, self.radius)
        info, pull = self.rounds.told(moved, lam, state.pull)
        return State(x, y, v, pull, self.hessian.watch(memory, v)), info
