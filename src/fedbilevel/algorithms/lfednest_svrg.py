"""LFedNest-SVRG: LFedNest with FedNest's corrected lower loop; the hypergradient stays each client's own.

After Tarzanagh, Li, Thrampoulidis & Oymak, ICML 2022, arXiv 2205.02215 (the light variants). The letters and v_i are those
of `lfednest.py`:

    T times  lower.gradient   q = mean d_y g_i(x, y)
             lower.steps      y = mean of y_i: FedSVRG steps with inner_lr from y around q
    upper                     x_i = x, `outer_steps` times: x_i <- x_i - outer_lr h_i(x_i),  h_i = d_x f_i - d2_xy g_i v_i

2T+1 rounds. This is NOT an estimator of the hypergradient where clients differ, and no number of terms removes the bias.

Floats per client: down T (2 dx + 3 dy) + dx+dy, up 2 T dy + dx.
"""

from __future__ import annotations

from typing import ClassVar, final

import equinox as eqx
import optax.tree
from jaxtyping import Array, Float, PyTree

from .. import algorithm
from ..algorithm import About, Algorithm, Info, Truncation, choice, component, count, option, rate
from ..federation import Client, Federation
from ..pace.curvature import AutoStep, Curvature, Rate, number
from .components.lower import CorrectedLower
from .components.neumann import LocalNeumann
from .components.optimizer import Optimizer, OuterOptimizer, resolve
from .components.steps import local_descent, norm


class State(algorithm.State):
    """x and y, and what options keep; None without them.

    Attributes:
        curvature: what `hessian_lr="auto"` remembers.
        optimizer: optax's state (`outer_optimizer`).
    """

    curvature: Curvature | None
    optimizer: PyTree


@final
class LFedNestSVRG(Algorithm):
    """LFedNest with FedNest's corrected lower loop: 2T+1 rounds; biased where clients differ, for Hessians stay local.

    The arguments are `FedNest`'s.
    """

    about: ClassVar[About] = About(
        name="lfednest-svrg",
        rounds="2T+1",
        when="as lfednest, with a lower level at y*",
        hypergradient="biased where clients differ",
        lower="at y* for any `local_steps`",
        biased=True,
    )

    follows: ClassVar[dict[str, str]] = Algorithm.follows | {"optimizer": "outer_optimizer"}

    hessian_lr: Rate | str = rate("auto", "auto")
    batch_size: int | None = count(None)
    neumann_terms: int = count(5)
    truncation: Truncation = eqx.field(default="uniform", converter=Truncation)
    inner_rounds: int = count(5)
    inner_lr: Rate | str = rate("auto", "auto")
    local_steps: int = count(5)
    skip_idle_rounds: bool = option(False)
    same_cohort: bool = option(False)
    outer_lr: Rate | str = rate("auto", "auto")
    outer_steps: int = count(1)
    outer_optimizer: Optimizer = choice(None)

    def __check_init__(self):
        resolve(self.outer_optimizer, "LFedNestSVRG")
        self.truncation.check_range("LFedNestSVRG", self.neumann_terms - 1)

    @component
    def hessian(self) -> AutoStep:
        """The step of the Hessian factors, which are a single client's own."""
        return AutoStep(self.hessian_lr, self.batch_size, local_factors=True)

    @component
    def lower(self) -> CorrectedLower:
        """The lower loop: anchored turns of two rounds."""
        step = self.inner_lr, self.local_steps, self.batch_size
        return CorrectedLower(self.inner_rounds, *step, self.skip_idle_rounds, self.same_cohort)

    @component
    def series(self) -> LocalNeumann:
        """The Neumann series, within each client."""
        return LocalNeumann(self.hessian, self.truncation, self.neumann_terms, self.batch_size)

    @component
    def optimizer(self) -> OuterOptimizer:
        """The server's step on x."""
        return OuterOptimizer(self.outer_optimizer, "LFedNestSVRG")

    @property
    def spares_unasked(self) -> bool:
        return self.outer_optimizer is None

    def init(self, x: PyTree, y: PyTree) -> State:
        return State(x, y, self.hessian.begin(y), self.optimizer.begin(x))

    def step(self, fed: Federation, state: State) -> tuple[State, Info]:
        lam, memory = self.hessian.ask(fed, state.x, state.y, state.curvature)
        y, slope = self.lower.rounds(fed, state.x, state.y)
        mean = fed.renewed(fed.average(self.upper, state.x, y, lam), state.x)
        size = norm(optax.tree.sub(mean, state.x)) / (number(self.outer_lr) * self.outer_steps)
        x, kept = self.optimizer.step(state.x, mean, state.optimizer)
        x = fed.renewed(x, state.x)
        return State(x, y, self.hessian.watch(memory, size), kept), Info(size, lower_gradient_norm=slope)

    def estimate(self, fed: Federation, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        lam, _ = self.hessian.ask(fed, x, y, self.hessian.begin(y))
        y, _ = self.lower.rounds(fed, x, y)
        return fed.average(self.series.local_hypergradient, x, y, lam), y

    def upper(self, client: Client, x: PyTree, y: PyTree, lam: Float[Array, ""] | None) -> PyTree:
        """Plain steps on x along the client's own hypergradients."""
        along = lambda s: lambda z: self.series.local_hypergradient(client, z, y, lam, s)
        return local_descent(along, x, number(self.outer_lr), self.outer_steps)
