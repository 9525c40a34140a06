"""FedBiOAcc: FedBiO along STORM estimates, with falling steps; one round an iteration.

After Li, Huang & Huang, "Communication-Efficient Federated Bilevel Optimization with Global and Local Lower Level Problems",
NeurIPS 2023, arXiv 2302.06701. The equations are REMEMBERED, not verified. With z = (x, y, v) and

    D_i(z) = ( d_x f_i - d2_xy g_i v,   d_y g_i,   d2_yy g_i v - d_y f_i )

every client takes `local_steps` steps along a STORM estimate of D_i (`components/tracking.py`), and the server averages z
and the estimates. Floats: down and up 2 dx + 4 dy each, and one number down.
"""

from __future__ import annotations

from typing import ClassVar, final

import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Int, PyTree

from .. import algorithm
from ..algorithm import About, Algorithm, Info, component, count, rate
from ..federation import Client, Federation
from ..pace.curvature import AutoStep, Curvature, Rate, number
from .components.diagnostics import of_each, residual
from .components.simultaneous import along
from .components.steps import norm
from .components.tracking import Point, Scalar, Tracking, check_forget


class State(algorithm.State):
    """z and its estimate.

    Attributes:
        v: the adjoint, like y.
        estimate: e, like (x, y, v).
        time: local steps so far.
        pull: |d_y f| of the first iteration, to which the residual of v is compared.
        curvature: what `hessian_lr="auto"` remembers.
    """

    v: PyTree
    estimate: Point
    time: Int[Array, ""]
    pull: Scalar
    curvature: Curvature | None


@final
class FedBiOAcc(Algorithm):
    """FedBiOAcc (NeurIPS 2023; equations remembered): FedBiO along STORM estimates, with falling steps.

    Args:
        inner_lr, hessian_lr, outer_lr: the step of the FIRST local steps of y, of v and of x; later ones are a_t of it.
            `hessian_lr="auto"` measures the curvature (ours).
        local_steps: local steps a round.
        batch_size: rows of a minibatch, fresh for every local step; None for all rows.
        forget: how much of the estimate a local step forgets at first; at most 1.
        slow_after: after how many local steps the steps have fallen to 0.79 (2^{-1/3}).
    """

    about: ClassVar[About] = About(
        name="fedbioacc",
        rounds="1",
        when="minibatches: directions followed by STORM",
        hypergradient="as SimFBO's, along STORM estimates with falling steps",
        lower="at y* with one local step; else beside it",
        no_blocks="the estimate of a block grows old while its owner is not asked",
    )

    follows: ClassVar[dict[str, str]] = Algorithm.follows | of_each("estimate")

    hessian_lr: Rate | str = rate("auto", "auto")
    batch_size: int | None = count(None)
    inner_lr: Rate | str = rate("auto", "auto")
    local_steps: int = count(5)
    outer_lr: Rate = rate(0.05, why="the clients' estimates follow x on their own way")
    forget: Rate = rate(0.1)
    slow_after: Rate = rate(1000.0)

    def __check_init__(self):
        check_forget(self.forget, "FedBiOAcc")

    @component
    def hessian(self) -> AutoStep:
        """The step of v."""
        return AutoStep(self.hessian_lr, self.batch_size, self.local_steps > 1)

    @component
    def tracking(self) -> Tracking:
        """The local steps, along a STORM estimate."""
        return Tracking(self.local_steps, self.forget, self.slow_after)

    def init(self, x: PyTree, y: PyTree) -> State:
        z = x, y, optax.tree.zeros_like(y)
        start = jnp.zeros((), jnp.int32), jnp.zeros_like(norm(y))
        return State(*z, optax.tree.zeros_like(z), *start, self.hessian.begin(y))

    def step(self, fed: Federation, state: State) -> tuple[State, Info]:
        lam, memory = self.hessian.ask(fed, state.x, state.y, state.curvature)
        z, t = (state.x, state.y, state.v), state.time
        moved, e = fed.average(self.moves, z, state.estimate, t, lam)
        x, y, v = optax.tree.add(z, moved)
        lag, pull = residual(state.pull, norm(e[2]))
        info = Info(norm(moved[0]) / (self.outer_lr * self.local_steps), None, lag, norm(e[1]))
        return State(x, y, v, e, t + self.local_steps, pull, self.hessian.watch(memory, v)), info

    def moves(self, client: Client, z: Point, e: Point, t: Int[Array, ""], lam: Scalar | None) -> tuple[Point, Point]:
        """How far the client's steps go from z, and its estimate there."""
        steps = self.outer_lr, number(self.inner_lr), self.hessian.lam(lam)
        end, e = self.tracking.follow(along(client, self.batch_size), z, e, t, steps)
        return optax.tree.sub(end, z), e
