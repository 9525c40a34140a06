"""LocalBSGM: local hypergradients, followed by momentum; one round for all local steps.

After Gao, "On the Convergence of Momentum-Based Algorithms for Federated Bilevel Optimization Problems", arXiv 2204.13299.
The equations are REMEMBERED, not verified. With z = (x, y), K = `neumann_terms` and

    D_i(z) = ( h_i(x, y), d_y g_i(x, y) ),    h_i = d_x f_i - J_i v_i,   v_i a K-term Neumann estimate of H_i^{-1} d_y f_i

every client takes `local_steps` steps along an estimate of D_i that momentum renews (`components/tracking.py`), and the
server averages z and the estimates.

The Hessian is each client's OWN: the mean of J_i H_i^{-1} d_y f_i is not J H^{-1} d_y f when clients differ. The fixed
point is where mean_i h_i(x, y*(x)) = 0, beside the solution, and no number of terms or rounds removes that
(`truncation="full"`: with v_i = lam sum_{n=0}^{K} (I - lam H_i)^n d_y f_i that point is known in closed form, and the tests
find it).

Floats per client and round: down 2 dx + 2 dy + 1, up 2 dx + 2 dy.
"""

from __future__ import annotations

from typing import ClassVar, final

import equinox as eqx
import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Int, PyTree

from .. import algorithm
from ..algorithm import About, Algorithm, Info, Truncation, component, count, rate
from ..federation import Client, Federation
from ..pace.curvature import AutoStep, Curvature, Rate, number
from .components.diagnostics import of_each
from .components.neumann import LocalNeumann
from .components.steps import norm
from .components.tracking import Point, Scalar, Tracking, along_local_hypergradients, check_forget


class State(algorithm.State):
    """z = (x, y) and its estimate.

    Attributes:
        estimate: e, like z.
        time: local steps so far.
        curvature: what `hessian_lr="auto"` remembers.
    """

    estimate: Point
    time: Int[Array, ""]
    curvature: Curvature | None


@final
class LocalBSGM(Algorithm):
    """LocalBSGM (Gao, 2022; equations remembered): momentum on local hypergradients; biased where clients differ.

    The arguments are `LocalBSGVRM`'s.
    """

    about: ClassVar[About] = About(
        name="localbsgm",
        rounds="1",
        when="clients are alike, minibatches: momentum; off the solution where they differ",
        hypergradient="biased where clients differ",
        lower="beside y* for two or more `local_steps`",
        biased=True,
        no_blocks="the estimate of a block grows old while its owner is not asked",
    )

    follows: ClassVar[dict[str, str]] = Algorithm.follows | of_each("estimate")

    hessian_lr: Rate | str = rate("auto", "auto")
    batch_size: int | None = count(None)
    neumann_terms: int = count(5)
    truncation: Truncation = eqx.field(default="uniform", converter=Truncation)
    inner_lr: Rate | str = rate("auto", "auto")
    local_steps: int = count(5)
    outer_lr: Rate = rate(0.05, why="the clients' estimates follow x on their own way")
    forget: Rate = rate(0.1)
    slow_after: Rate = rate(1000.0)

    def __check_init__(self):
        self.truncation.check_range("LocalBSGM", self.neumann_terms - 1)
        check_forget(self.forget, "LocalBSGM")

    @component
    def hessian(self) -> AutoStep:
        """The step of the series' factors, which are each client's own."""
        return AutoStep(self.hessian_lr, self.batch_size, local_factors=True)

    @component
    def series(self) -> LocalNeumann:
        """The clients' own hypergradients."""
        return LocalNeumann(self.hessian, self.truncation, self.neumann_terms, self.batch_size)

    @component
    def tracking(self) -> Tracking:
        """The local steps, along an estimate that momentum renews."""
        return Tracking(self.local_steps, self.forget, self.slow_after, by_momentum=True)

    def init(self, x: PyTree, y: PyTree) -> State:
        return State(x, y, optax.tree.zeros_like((x, y)), jnp.zeros((), jnp.int32), self.hessian.begin(y))

    def step(self, fed: Federation, state: State) -> tuple[State, Info]:
        lam, memory = self.hessian.ask(fed, state.x, state.y, state.curvature)
        z, t = (state.x, state.y), state.time
        moved, e = fed.average(self.moves, z, state.estimate, t, lam)
        x, y = optax.tree.add(z, moved)
        h = norm(moved[0]) / (self.outer_lr * self.local_steps)
        after = State(x, y, e, t + self.local_steps, self.hessian.watch(memory, h))
        return after, Info(h, lower_gradient_norm=norm(e[1]))

    def moves(self, client: Client, z: Point, e: Point, t: Int[Array, ""], lam: Scalar | None) -> tuple[Point, Point]:
        """How far the client's steps go from z, and its estimate there."""
        along = along_local_hypergradients(client, self.series, lam)
        end, e = self.tracking.follow(along, z, e, t, (self.outer_lr, number(self.inner_lr)))
        return optax.tree.sub(end, z), e
