"""FedNest and FedNest-SGD: the lower loop first, the hypergradient in rounds of its own (approximate implicit
differentiation, AID).

After Tarzanagh, Li, Thrampoulidis & Oymak, "FedNest: Federated Bilevel, Minimax, and Compositional Optimization",
ICML 2022, arXiv 2205.02215. With T = `inner_rounds`, N = `neumann_terms`, lam = `hessian_lr` (the paper's 1/l):

    T times       gradient  q = mean d_y g_i(x, y),  lower  FedSVRG steps on y around q     (FedNest: two rounds)
                  lower     plain local SGD on y                                            (FedNest-SGD: one round)
    vector_start  p_0 = mean d_y f_i(x, y)
    factor        p_n = mean (I - lam d2_yy g_i) p_{n-1},  n = 1..N', fresh clients each
    hypergradient h = mean d_x f_i - d2_xy g_i v
    upper         FedSVRG steps on x around h, y and v fixed

`truncation="uniform"`: N' ~ Uniform{0..N-1}, v = N lam p_N', so that E v = v* - (I - lam H)^N v*; 2T+N'+3 rounds, on
average 2T+(N+5)/2. `truncation="full"`: v = lam sum_{n=0}^{N} p_n; 2T+N+3 rounds, which is what the paper publishes and its
code counts. FedNest-SGD saves T of them. (The public code differs from the paper; this is the paper.)

`same_cohort` (as in the public code): the two exchanges of a lower turn ask one cohort, and all exchanges from vector_start
on ask another one. Rounds and bytes stay the same; but factors of one cohort are not independent: the estimate is biased,
and more terms do not help.

Floats per client, with K = N' or N: down T (2 dx + 3 dy) + (dx+dy) + (K+1)(dx+2 dy) + 2 dx+2 dy, up (2T+1+K) dy + 2 dx.
FedNest-SGD: down T (dx+dy) and up T dy in place of the first terms.
"""

from __future__ import annotations

from typing import Any, ClassVar

import optax.tree
from jaxtyping import PyTree

from ..algorithm import About
from ..federation import Client
from .components.directions import hessian_factor
from .components.steps import growth, norm
from .curvature import keeping
from .parts import CorrectedLower, CorrectedUpper, LocalLower, NeumannFields, one_cohort


class _NeumannHypergradient(NeumannFields, CorrectedUpper):
    """FedNest's upper level: Neumann rounds at the lower loop's last y, and corrected upper steps."""

    def estimate_parts(self, fed, state):
        lam, kept = self.hessian_step(fed, state)
        x = state.x
        y, slope = self.lower_rounds(fed, x, state.y)
        N, full = self.neumann_terms, self.truncation.full
        factors = N if full else self.truncation.draw(fed, N - 1)
        cohort = one_cohort(fed, self.same_cohort)
        start = fed.average(self.vector_start, x, y, cohort=cohort)

        def turn(n, loop):
            p, total = loop
            p = fed.average(self.factor, x, y, p, lam, cohort=cohort)
            return p, optax.tree.add(total, p) if full else total

        p, total = fed.repeat(factors, turn, (start, start), most=N)
        v = self.cut(total, p, self.lam(lam))
        h = fed.average(self.hypergradient, x, y, v, cohort=cohort)
        stretched = growth(norm(p), norm(start))
        # H lam sum_{n<N} p_n = p_0 - p_N: the residual but for the last term; a random term has none
        told = {
            "vector_growth": stretched,
            "vector_residual": stretched if full else None,
            "lower_gradient_norm": slope,
        }
        return h, v, told, keeping(x, y, kept), cohort

    def vector_start(self, client: Client, x: PyTree, y: PyTree) -> PyTree:
        """d_y f_i."""
        return client.problem.outer_gradients(x, y, client.batch("outer", self.batch_size))[1]

    def factor(self, client: Client, x: PyTree, y: PyTree, p: PyTree, lam: Any) -> PyTree:
        """(I - lam d2_yy g_i) p."""
        return hessian_factor(client.problem, x, y, p, self.lam(lam), client.batch("inner", self.batch_size))


class FedNest(_NeumannHypergradient, CorrectedLower):
    """FedNest (Tarzanagh et al., ICML 2022): 2T+N+3 rounds published; "uniform" needs 2T+N'+3, N' drawn from 0..N-1.

    Args:
        inner_rounds: T >= 1, the turns of the lower loop.
        inner_lr: the step of ONE local lower step.
        local_steps: local lower steps a turn.
        neumann_terms: N >= 1, the terms of the Neumann series.
        hessian_lr: the series' step, the paper's 1/l; diverges from 2 / (largest curvature of g) on. "auto" measures
            that curvature (ours; up to five rounds every 20 iterations, at first more often).
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


class FedNestSGD(_NeumannHypergradient, LocalLower):
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
