"""FedNest-SGD: FedNest with plain local SGD for its lower loop, which saves T = `inner_rounds` rounds an iteration.

After Tarzanagh, Li, Thrampoulidis & Oymak, ICML 2022, arXiv 2205.02215. The letters are those of `fednest.py`, and so are
`truncation` and the upper level:

    T times       lower.steps      y = mean of y_i: plain steps with inner_lr from y
    series.start, series.factor    p_0, p_n, and v
    upper.hypergradient            h = mean d_x f_i - d2_xy g_i v
    upper.steps                    x = mean of x_i: FedSVRG steps with outer_lr around h, y and v fixed

T+N'+3 rounds ("uniform"), or T+N+3 ("full"). `same_cohort` is about the exchanges from series.start on.

Floats per client, with K = N' or N: down T (dx+dy) + (dx+dy) + (K+1)(dx+2 dy) + 2 dx+2 dy, up (T+1+K) dy + 2 dx.
"""

from __future__ import annotations

from typing import ClassVar, final

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from .. import algorithm
from ..algorithm import About, Algorithm, Info, Truncation, choice, component, count, option, rate
from ..federation import Federation
from ..pace.curvature import AutoStep, Curvature, Rate
from .components.lower import LocalLower
from .components.neumann import NeumannSeries
from .components.optimizer import Optimizer, OuterOptimizer, resolve
from .components.steps import norm
from .components.upper import CorrectedUpper, one_cohort

Scalar = Float[Array, ""]


class State(algorithm.State):
    """x and y, and what options keep; None without them.

    Attributes:
        curvature: what `hessian_lr="auto"` remembers.
        optimizer: optax's state (`outer_optimizer`).
    """

    curvature: Curvature | None
    optimizer: PyTree


@final
class FedNestSGD(Algorithm):
    """FedNest with plain local SGD inside: T+N+3 rounds, and a lower level off y* for two or more local steps.

    The arguments are `FedNest`'s.
    """

    about: ClassVar[About] = About(
        name="fednest-sgd",
        rounds="T+N+3",
        when="one local step, where the anchor round would be idle",
        hypergradient="right at its own y",
        lower="beside y* for two or more `local_steps`",
        exact={"inner_rounds": 600, "neumann_terms": 600},
    )

    follows: ClassVar[dict[str, str]] = Algorithm.follows | {"optimizer": "outer_optimizer"}

    hessian_lr: Rate | str = rate("auto", "auto")
    batch_size: int | None = count(None)
    neumann_terms: int = count(5)
    truncation: Truncation = eqx.field(default="uniform", converter=Truncation)
    inner_rounds: int = count(5)
    inner_lr: Rate | str = rate("auto", "auto")
    local_steps: int = count(5)
    outer_lr: Rate | str = rate("auto", "auto")
    outer_steps: int = count(1)
    skip_idle_rounds: bool = option(False)
    same_cohort: bool = option(False)
    outer_optimizer: Optimizer = choice(None)

    def __check_init__(self):
        resolve(self.outer_optimizer, "FedNestSGD")
        self.truncation.check_range("FedNestSGD", self.neumann_terms - 1)

    @component
    def hessian(self) -> AutoStep:
        """The step of the Hessian factors."""
        return AutoStep(self.hessian_lr, self.batch_size)

    @component
    def lower(self) -> LocalLower:
        """The lower loop: plain local SGD, a round a turn."""
        return LocalLower(self.inner_rounds, self.inner_lr, self.local_steps, self.batch_size)

    @component
    def series(self) -> NeumannSeries:
        """The Neumann series, in rounds of its own."""
        return NeumannSeries(self.hessian, self.truncation, self.neumann_terms, self.batch_size)

    @component
    def upper(self) -> CorrectedUpper:
        """The upper level."""
        return CorrectedUpper(self.outer_lr, self.outer_steps, self.batch_size, self.skip_idle_rounds)

    @component
    def optimizer(self) -> OuterOptimizer:
        """The server's step on x."""
        return OuterOptimizer(self.outer_optimizer, "FedNestSGD")

    @property
    def spares_unasked(self) -> bool:
        return self.outer_optimizer is None

    def init(self, x: PyTree, y: PyTree) -> State:
        return State(x, y, self.hessian.begin(y), self.optimizer.begin(x))

    def step(self, fed: Federation, state: State) -> tuple[State, Info]:
        h, v, told, after, cohort = self.estimate_parts(fed, state)
        mean = self.upper.move(fed, state.x, after.y, v, h, cohort)
        x, kept = self.optimizer.step(state.x, mean, state.optimizer)
        x = fed.renewed(x, state.x)
        return State(x, after.y, self.hessian.watch(after.curvature, v), kept), Info(norm(h), *told)

    def estimate(self, fed: Federation, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        h, _, _, after, _ = self.estimate_parts(fed, self.init(x, y))
        return h, after.y

    def estimate_parts(
        self, fed: Federation, state: State
    ) -> tuple[PyTree, PyTree, tuple[Scalar | None, ...], State, jax.Array | None]:
        """(h, v such that h = d_x f - d2_xy g v, the rest of `Info`, the state but for a new x, and the clients of the
        upper round, None for fresh ones)."""
        lam, memory = self.hessian.ask(fed, state.x, state.y, state.curvature)
        x = state.x
        y, slope = self.lower.rounds(fed, x, state.y)
        factors = self.series.draw(fed)
        cohort = one_cohort(fed, self.same_cohort)
        v, stretched, lag = self.series.rounds(fed, x, y, factors, lam, cohort)
        h = self.upper.estimate(fed, x, y, v, cohort)
        return h, v, (stretched, lag, slope), State(x, y, memory, state.optimizer), cohort
