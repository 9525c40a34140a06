"""FedMBO: parallel Neumann chains, each factor at one client. T + max N'_s + 2 rounds an iteration.

After Huang, Zhang & Ji, "Achieving Linear Speedup in Non-IID Federated Bilevel Learning", ICML 2023, arXiv 2302.05412. The
equations are REMEMBERED, not verified. T = `inner_rounds`, N = `neumann_terms`, lam = `hessian_lr`, n = `chains`:

    T times       lower    (minibatch) gradient steps on y at a cohort, averaged
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

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ..algorithm import About, Info, State, Truncation, choice, count, rate
from ..errors import check
from ..federation import Client, Federation, When
from .components.directions import hessian_factor, hypergradient
from .components.steps import descend, norm
from .curvature import AutoStep, keeping
from .neumann import NeumannSeries
from .optimizer import begin, outer_step, resolve
from .parts import LocalLower


class FedMBO(LocalLower, NeumannSeries):
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
    )

    follows: ClassVar[dict[str, str]] = AutoStep.follows | {"optimizer": "outer_optimizer"}

    inner_rounds: int = count(5)
    inner_lr: Any = rate(0.01)
    local_steps: int = count(1)
    neumann_terms: int = count(5)
    hessian_lr: Any = rate(0.01, "auto")
    outer_lr: Any = rate(0.05)
    chains: int = count(4)
    batch_size: int | None = count(None)
    truncation: Any = eqx.field(default="uniform", converter=Truncation)
    outer_optimizer: Any = choice(None)

    def __check_init__(self):
        check(not self.truncation.full, "FedMBO's chains end at random: truncation= is 'uniform' or a whole number.")
        resolve(self.outer_optimizer, "FedMBO")

    @property
    def local_factors(self):
        return True

    def keeps(self, x, y):
        return super().keeps(x, y) | begin(self.outer_optimizer, x)

    def step(self, fed: Federation, state: State) -> tuple[State, Info]:
        lam, kept = self.hessian_step(fed, state)
        h, y, slope = self._estimate(fed, state.x, state.y, lam)
        kept = self.watch(kept, norm(h))
        x, kept = outer_step(self.outer_optimizer, state.x, descend(state.x, self.outer_lr, h), kept)
        return keeping(x, y, kept), Info(norm(h), jnp.zeros_like(norm(h)), None, slope)

    def estimate(self, fed, x, y):
        lam, _ = self.hessian_step(fed, self.init(x, y))
        return self._estimate(fed, x, y, lam)[:2]

    def _estimate(self, fed, x, y, lam):
        y, slope = self.lower_rounds(fed, x, y)
        cuts = [self.truncation.draw(fed, self.neumann_terms - 1) for _ in range(self.chains)]
        one = lambda s, method, *message, **flags: fed.average(
            method, *message, cohort=fed.draw_cohort(1), beside=s > 0, **flags
        )

        def turn(t, vectors):
            after = []
            for s, (p, cut) in enumerate(zip(vectors, cuts, strict=True)):
                going = t < cut
                new = one(s, self.factor, fed.when(going, (x, y, lam)), fed.when(going, p), replies=(going,))
                after.append(jax.tree.map(lambda new, old, going=going: jnp.where(going, new, old), new, p))
            return after

        vectors = [one(s, self.vector_start, x, y) for s in range(self.chains)]
        vectors = fed.repeat(jnp.max(jnp.stack(cuts)), turn, vectors, most=max(1, self.neumann_terms - 1))
        ends = [self.cut(p, p, self.lam(lam)) for p in vectors]
        hs = [one(s, self.hypergradient, x, y, v) for s, v in enumerate(ends)]
        return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *hs), y, slope

    def vector_start(self, client: Client, x: PyTree, y: PyTree) -> PyTree:
        """d_y f_i."""
        return client.problem.outer_gradients(x, y, client.batch("outer", self.batch_size))[1]

    def factor(self, client: Client, at: When, p: When) -> PyTree:
        """(I - lam d2_yy g_i) p; `at` is (x, y, lam)."""
        x, y, lam = at.value
        return hessian_factor(client.problem, x, y, p.value, self.lam(lam), client.batch("inner", self.batch_size))

    def hypergradient(self, client: Client, x: PyTree, y: PyTree, v: PyTree) -> PyTree:
        """d_x f_i - d2_xy g_i v."""
        rows = [client.batch(level, self.batch_size) for level in ("inner", "outer")]
        return hypergradient(client.problem, x, y, v, *rows)
