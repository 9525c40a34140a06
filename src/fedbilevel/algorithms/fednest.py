"""FedNest: the lower loop first, the hypergradient in rounds of its own (approximate implicit differentiation, AID).

After Tarzanagh, Li, Thrampoulidis & Oymak, "FedNest: Federated Bilevel, Minimax, and Compositional Optimization",
ICML 2022, arXiv 2205.02215. With T = `inner_rounds`, N = `neumann_terms`, lam = `hessian_lr` (the paper's 1/l):

    T times       lower.gradient   q = mean d_y g_i(x, y)
                  lower.steps      y = mean of y_i: FedSVRG steps with inner_lr from y around q
    series.start                   p_0 = mean d_y f_i(x, y)
    series.factor                  p_n = mean (I - lam d2_yy g_i) p_{n-1},  n = 1..N', fresh clients each
    upper.hypergradient            h = mean d_x f_i - d2_xy g_i v
    upper.steps                    x = mean of x_i: FedSVRG steps with outer_lr around h, y and v fixed

`truncation="uniform"`: N' ~ Uniform{0..N-1}, v = N lam p_N', so that E v = v* - (I - lam H)^N v*; 2T+N'+3 rounds, on
average 2T+(N+5)/2. `truncation="full"`: v = lam sum_{n=0}^{N} p_n; 2T+N+3 rounds, which is what the paper publishes and its
code counts. (The public code differs from the paper; this is the paper.)

`same_cohort` (as in the public code): the two exchanges of a lower turn ask one cohort, and all exchanges from series.start
on ask another one. Rounds and bytes stay the same; but factors of one cohort are not independent: the estimate is biased,
and more terms do not help.

Floats per client, with K = N' or N: down T (2 dx + 3 dy) + (dx+dy) + (K+1)(dx+2 dy) + 2 dx+2 dy, up (2T+1+K) dy + 2 dx.
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
from .components.lower import CorrectedLower
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
class FedNest(Algorithm):
    """FedNest (Tarzanagh et al., ICML 2022): 2T+N+3 rounds published; "uniform" needs 2T+N'+3, N' drawn from 0..N-1.

    Args:
        inner_rounds: T >= 1, the turns of the lower loop.
        inner_lr: the step of ONE local lower step.
        local_steps: local lower steps a turn.
        neumann_terms: N >= 1, the terms of the Neumann series.
        hessian_lr: the series' step, the paper's 1/l; diverges from 2 / (largest curvature of g) on. "auto" measures
            that curvature (ours).
        outer_lr: the step of ONE local upper step.
        outer_steps: local upper steps an iteration.
        batch_size: rows of a minibatch, fresh for every factor; None for all rows.
        truncation: "uniform" (the paper's random N'), "full" (all terms summed), or an int that fixes N' in 0..N-1.
        skip_idle_rounds: leave out rounds in which one local step adds nothing.
        same_cohort: one cohort for the exchanges of a lower turn and one for the upper level's, instead of a fresh one
            for each; biased, see above.
        outer_optimizer: an optax transformation applied at the server to x - mean x_i, or its name and learning rate as in
            "adam:0.01"; None: the mean itself.
    """

    about: ClassVar[About] = About(
        name="fednest",
        rounds="2T+N+3",
        when="the series at the last y; truncation=full for comparisons at equal work",
        hypergradient='right where clients differ; with `truncation="uniform"` on average, and noisy',
        lower="at y* for any `local_steps`",
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
    skip_idle_rounds: bool = option(False)
    same_cohort: bool = option(False)
    outer_lr: Rate | str = rate("auto", "auto")
    outer_steps: int = count(1)
    outer_optimizer: Optimizer = choice(None)

    def __check_init__(self):
        resolve(self.outer_optimizer, "FedNest")
        self.truncation.check_range("FedNest", self.neumann_terms - 1)

    @component
    def hessian(self) -> AutoStep:
        """The step of the Hessian factors."""
        return AutoStep(self.hessian_lr, self.batch_size)

    @component
    def lower(self) -> CorrectedLower:
        """The lower loop: anchored turns of two rounds."""
        step = self.inner_lr, self.local_steps, self.batch_size
        return CorrectedLower(self.inner_rounds, *step, self.skip_idle_rounds, self.same_cohort)

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
        return OuterOptimizer(self.outer_optimizer, "FedNest")

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
