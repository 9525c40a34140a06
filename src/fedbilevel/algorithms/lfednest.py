"""LFedNest: every client forms a hypergradient of its own, with its own Hessian.

After Tarzanagh, Li, Thrampoulidis & Oymak, ICML 2022, arXiv 2205.02215 (the light variants). T = `inner_rounds`,
N = `neumann_terms`, lam = `hessian_lr`, and clients average only y and x:

    T times  lower.steps   y = mean of y_i: plain steps with inner_lr from y
    upper                  x_i = x, `outer_steps` times: x_i <- x_i - outer_lr h_i(x_i),  h_i = d_x f_i - d2_xy g_i v_i

where v_i is the client's own Neumann estimate of H_i^{-1} d_y f_i: "uniform", N lam (I - lam H_i)^N' d_y f_i with N' drawn
by the client from 0..N-1, or "full", lam sum_{n=0}^{N} (I - lam H_i)^n d_y f_i. T+1 rounds.

This is NOT an estimator of the hypergradient: the mean of J_i H_i^{-1} d_y f_i is not J H^{-1} d_y f when clients differ,
and no number of terms removes the bias.

Floats per client: down T (dx+dy) + dx+dy, up T dy + dx.
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
from .components.lower import LocalLower
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
class LFedNest(Algorithm):
    """LFedNest (Tarzanagh et al., ICML 2022): T+1 rounds; biased where clients differ. The arguments are `FedNest`'s."""

    about: ClassVar[About] = About(
        name="lfednest",
        rounds="T+1",
        when="clients are alike and rounds very dear; off the solution where they differ",
        hypergradient="biased where clients differ",
        lower="beside y* for two or more `local_steps`",
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
    outer_lr: Rate | str = rate("auto", "auto")
    outer_steps: int = count(1)
    skip_idle_rounds: bool = option(False)
    same_cohort: bool = option(False)
    outer_optimizer: Optimizer = choice(None)

    def __check_init__(self):
        resolve(self.outer_optimizer, "LFedNest")
        self.truncation.check_range("LFedNest", self.neumann_terms - 1)

    @component
    def hessian(self) -> AutoStep:
        """The step of the Hessian factors, which are a single client's own."""
        return AutoStep(self.hessian_lr, self.batch_size, local_factors=True)

    @component
    def lower(self) -> LocalLower:
        """The lower loop: plain local SGD, a round a turn."""
        return LocalLower(self.inner_rounds, self.inner_lr, self.local_steps, self.batch_size)

    @component
    def series(self) -> LocalNeumann:
        """The Neumann series, within each client."""
        return LocalNeumann(self.hessian, self.truncation, self.neumann_terms, self.batch_size)

    @component
    def optimizer(self) -> OuterOptimizer:
        """The server's step on x."""
        return OuterOptimizer(self.outer_optimizer, "LFedNest")

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
