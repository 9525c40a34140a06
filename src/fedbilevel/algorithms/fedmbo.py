"""FedMBO: parallel Neumann chains, each factor at one client. T + max N'_s + 2 rounds an iteration.

After Huang, Zhang & Ji, "Achieving Linear Speedup in Non-IID Federated Bilevel Learning", ICML 2023, arXiv 2302.05412. The
equations are REMEMBERED, not verified. T = `inner_rounds`, N = `neumann_terms`, lam = `hessian_lr`, n = `chains`:

    T times       lower.steps  (minibatch) gradient steps on y at a cohort, averaged
    chain s = 1..n, all in the same rounds, N'_s ~ Uniform{0..N-1}, and one random client in each exchange:
      vector_start   p_s = d_y f_i(x, y)
      factor         p_s <- (I - lam d2_yy g_i) p_s          N'_s times
      hypergradient  h_s = d_x f_i - d2_xy g_i v_s,   v_s = N lam p_s
    x <- x - outer_lr mean_s h_s

Every factor sees a client drawn anew, so that the mean of a product is the product of the means: E v = v* - (I - lam H)^N
v*. The variance of h falls as 1/n, and the largest N'_s, and with it the rounds, grows with n: towards T + N + 1. With
constant steps there is a floor from that variance, with everybody and all rows too: a factor at one client is noise where
clients differ.

Floats: down T (dx+dy) per client of the cohort; of the chains (all n together) n (dx+dy) + sum N'_s (dx+2 dy) + n (dx+2 dy).
Up T dy per client of the cohort, and n dy + sum N'_s dy + n dx.
"""

from __future__ import annotations

from typing import ClassVar, final

import equinox as eqx
import jax
import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Float, Int, PyTree

from .. import algorithm
from ..algorithm import About, Algorithm, Info, Truncation, choice, component, count, rate
from ..errors import check
from ..federation import Client, Federation, When
from ..pace.curvature import AutoStep, Curvature, Rate, number
from .components.directions import hessian_factor, hypergradient
from .components.lower import LocalLower
from .components.optimizer import Optimizer, OuterOptimizer, resolve
from .components.steps import descend, norm

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
class FedMBO(Algorithm):
    """FedMBO (ICML 2023; equations remembered): variance falls with the number of parallel chains; one client a factor.

    Args:
        inner_rounds: T >= 1, the rounds on y.
        inner_lr: the step of ONE local lower step.
        local_steps: local lower steps a round; more than one leaves y beside y* where clients differ.
        neumann_terms: N >= 1, the terms of the series that a chain's random one stands for.
        hessian_lr: the series' step; diverges from 2 / (largest curvature of any g_i) on. "auto" measures it (ours).
        outer_lr: the step of x.
        chains: n, how many run side by side.
        batch_size: rows of a minibatch, fresh for every factor; None for all rows.
        truncation: "uniform", or an int that fixes all N'_s in 0..N-1 (a test device).
        outer_optimizer: an optax transformation applied at the server to outer_lr h, or its name and learning rate as in
            "adam:0.01".
    """

    about: ClassVar[About] = About(
        name="fedmbo",
        rounds="T+N+1",
        when="sampled clients: the variance falls with the number of chains; at most so many rounds",
        hypergradient="right on average; noisy, less with more `chains`",
        lower="beside y* for two or more `local_steps`",
        no_blocks="each factor of its series is that of one client alone, and of hardly any block",
    )

    follows: ClassVar[dict[str, str]] = Algorithm.follows | {"optimizer": "outer_optimizer"}

    hessian_lr: Rate | str = rate("auto", "auto")
    batch_size: int | None = count(None)
    neumann_terms: int = count(5)
    truncation: Truncation = eqx.field(default="uniform", converter=Truncation)
    inner_rounds: int = count(5)
    inner_lr: Rate | str = rate("auto", "auto")
    local_steps: int = count(1)
    outer_lr: Rate | str = rate("auto", "auto")
    chains: int = count(4)
    outer_optimizer: Optimizer = choice(None)

    def __check_init__(self):
        check(not self.truncation.full, "FedMBO's chains end at random: truncation= is 'uniform' or a whole number.")
        resolve(self.outer_optimizer, "FedMBO")
        self.truncation.check_range("FedMBO", self.neumann_terms - 1)

    @component
    def hessian(self) -> AutoStep:
        """The step of the Hessian factors, each of which is a single client's."""
        return AutoStep(self.hessian_lr, self.batch_size, local_factors=True)

    @component
    def lower(self) -> LocalLower:
        """The lower loop: plain local SGD, a round a turn."""
        return LocalLower(self.inner_rounds, self.inner_lr, self.local_steps, self.batch_size)

    @component
    def optimizer(self) -> OuterOptimizer:
        """The server's step on x."""
        return OuterOptimizer(self.outer_optimizer, "FedMBO")

    def init(self, x: PyTree, y: PyTree) -> State:
        return State(x, y, self.hessian.begin(y), self.optimizer.begin(x))

    def step(self, fed: Federation, state: State) -> tuple[State, Info]:
        lam, memory = self.hessian.ask(fed, state.x, state.y, state.curvature)
        y, slope = self.lower.rounds(fed, state.x, state.y)
        h = self._mean_of_chains(fed, state.x, y, lam)
        x, kept = self.optimizer.step(state.x, descend(state.x, number(self.outer_lr), h), state.optimizer)
        return State(x, y, self.hessian.watch(memory, h), kept), Info(norm(h), lower_gradient_norm=slope)

    def estimate(self, fed: Federation, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        lam, _ = self.hessian.ask(fed, x, y, self.hessian.begin(y))
        y, _ = self.lower.rounds(fed, x, y)
        return self._mean_of_chains(fed, x, y, lam), y

    def _mean_of_chains(self, fed: Federation, x: PyTree, y: PyTree, lam: Scalar | None) -> PyTree:
        """h; of the chains' exchanges side by side, the first makes a round, and the others are beside it."""
        cuts = [self.truncation.draw(fed, self.neumann_terms - 1) for _ in range(self.chains)]

        def turn(t: int | Int[Array, ""], vectors: list[PyTree]) -> list[PyTree]:
            after = []
            for s, (p, cut) in enumerate(zip(vectors, cuts, strict=True)):
                going = t < cut
                message, asked = (fed.when(going, (x, y, lam)), fed.when(going, p)), fed.draw_cohort(1)
                new = fed.average(self.factor, *message, replies=(going,), cohort=asked, beside=s > 0)
                after.append(jax.tree.map(lambda new, old, going=going: jnp.where(going, new, old), new, p))
            return after

        vectors, hs = [], []
        for s in range(self.chains):
            vectors.append(fed.average(self.vector_start, x, y, cohort=fed.draw_cohort(1), beside=s > 0))
        vectors = fed.repeat(jnp.max(jnp.stack(cuts)), turn, vectors, most=max(1, self.neumann_terms - 1))
        for s, p in enumerate(vectors):
            v = optax.tree.scale(self.hessian.lam(lam) * self.neumann_terms, p)
            hs.append(fed.average(self.hypergradient, x, y, v, cohort=fed.draw_cohort(1), beside=s > 0))
        return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *hs)

    # The clients' side ----------------------------------------------------------------------------------------------

    def vector_start(self, client: Client, x: PyTree, y: PyTree) -> PyTree:
        """d_y f_i."""
        return client.problem.outer_gradients(x, y, client.batch("outer", self.batch_size))[1]

    def factor(self, client: Client, at: When, p: When) -> PyTree:
        """(I - lam d2_yy g_i) p; `at` is (x, y, lam)."""
        x, y, lam = at.value
        return hessian_factor(
            client.problem, x, y, p.value, self.hessian.lam(lam), client.batch("inner", self.batch_size)
        )

    def hypergradient(self, client: Client, x: PyTree, y: PyTree, v: PyTree) -> PyTree:
        """d_x f_i - d2_xy g_i v."""
        rows = [client.batch(level, self.batch_size) for level in ("inner", "outer")]
        return hypergradient(client.problem, x, y, v, *rows)
