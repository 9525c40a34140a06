"""FedBiO: local steps on x, y and v, averaged once a round.

After Li, Huang & Huang, "Communication-Efficient Federated Bilevel Optimization with Global and Local Lower Level Problems",
NeurIPS 2023, arXiv 2302.06701. The equations are REMEMBERED, not verified. One round for `local_steps` local steps.

FedBiO: z_i <- z_i - (outer_lr, inner_lr, hessian_lr) D_i(z_i), `local_steps` times, and the mean of z_i, with

    D_i(z) = ( d_x f_i - d2_xy g_i v,   d_y g_i,   d2_yy g_i v - d_y f_i )        at z = (x, y, v)

that is u = v on the quadratic u'Hu/2 - u'd_y f. It is SimFBO with a server step of one. Floats: down and up dx + 2 dy each.
"""

from __future__ import annotations

from typing import ClassVar, final

import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Float, PyTree

from .. import algorithm
from ..algorithm import About, Algorithm, Info, component, count, rate
from ..federation import Federation
from ..pace.curvature import AutoStep, Curvature, Rate
from .components.directions import direction
from .components.simultaneous import LocalRounds
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
class FedBiO(Algorithm):
    """FedBiO (NeurIPS 2023; equations remembered): x, y, v by local steps, averaged; a floor for two or more of them.

    Args:
        inner_lr, hessian_lr, outer_lr: the step of ONE local step of y, of v and of x. `hessian_lr="auto"` measures the
            curvature (ours).
        local_steps: local steps a round.
        batch_size: rows of a minibatch, fresh for every local step; None for all rows.
    """

    about: ClassVar[About] = About(
        name="fedbio",
        rounds="1",
        when="simfbo with a server step of one",
        hypergradient="right with one local step; else off by the order of the steps",
        lower="at y* with one local step; else beside it",
    )

    hessian_lr: Rate | str = rate("auto", "auto")
    batch_size: int | None = count(None)
    inner_lr: Rate | str = rate("auto", "auto")
    local_steps: int = count(5)
    outer_lr: Rate | str = rate("auto", "auto")

    @component
    def hessian(self) -> AutoStep:
        """The step of v: from single clients' curvature, where they take several steps between two means."""
        return AutoStep(self.hessian_lr, self.batch_size, self.local_steps > 1)

    @component
    def rounds(self) -> LocalRounds:
        """The clients' local steps."""
        return LocalRounds(self.hessian, direction, self.outer_lr, self.inner_lr, self.local_steps, self.batch_size)

    @property
    def spares_unasked(self) -> bool:
        return True

    def init(self, x: PyTree, y: PyTree) -> State:
        return State(x, y, optax.tree.zeros_like(y), jnp.zeros_like(norm(y)), self.hessian.begin(y))

    def step(self, fed: Federation, state: State) -> tuple[State, Info]:
        lam, memory = self.hessian.ask(fed, state.x, state.y, state.curvature)
        z = state.x, state.y, state.v
        moved = fed.average(self.rounds.moves, *z, lam)
        x, y, v = optax.tree.add(z, moved)
        info, pull = self.rounds.told(moved, lam, state.pull)
        return State(x, y, v, pull, self.hessian.watch(memory, v)), info
