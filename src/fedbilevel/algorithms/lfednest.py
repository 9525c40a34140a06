"""LFedNest and LFedNest-SVRG: every client forms a hypergradient of its own, with its own Hessian.

After Tarzanagh, Li, Thrampoulidis & Oymak, ICML 2022, arXiv 2205.02215 (the light variants). T = `inner_rounds`,
N = `neumann_terms`, lam = `hessian_lr`, and clients average only y and x:

    T times  lower   plain local SGD on y (one round), or with SVRG gradient + FedSVRG steps (two rounds)
    upper            x_i = x, `outer_steps` times: x_i <- x_i - outer_lr h_i(x_i),  h_i = d_x f_i - d2_xy g_i v_i

where v_i is the client's own Neumann estimate of H_i^{-1} d_y f_i: "uniform", N lam (I - lam H_i)^N' d_y f_i with N' drawn
by the client from 0..N-1, or "full", lam sum_{n=0}^{N} (I - lam H_i)^n d_y f_i. T+1 rounds (LFedNest), 2T+1 (SVRG).

This is NOT an estimator of the hypergradient: the mean of J_i H_i^{-1} d_y f_i is not J H^{-1} d_y f when clients differ,
and no number of terms removes the bias.

Floats per client: down T (dx+dy) + dx+dy, up T dy + dx; with SVRG down T (2 dx + 3 dy) + dx+dy, up 2 T dy + dx.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
import optax.tree
from jaxtyping import PyTree

from ..algorithm import About, Info, State
from ..federation import Client, Federation
from .components.steps import local_descent, norm
from .curvature import keeping
from .neumann import LocalNeumann
from .optimizer import outer_step
from .parts import CorrectedLower, LocalLower, NeumannFields


class _LocalHypergradient(NeumannFields, LocalNeumann):
    """The upper level of the light variants: Neumann series and x steps within each client."""

    def step(self, fed: Federation, state: State) -> tuple[State, Info]:
        lam, kept = self.hessian_step(fed, state)
        y, slope = self.lower_rounds(fed, state.x, state.y)
        mean = fed.average(self.upper, state.x, y, lam)
        moved = norm(optax.tree.sub(mean, state.x))
        size = moved / (self.outer_lr * self.outer_steps)
        x, kept = outer_step(self.outer_optimizer, state.x, mean, self.watch(kept, size))
        return keeping(x, y, kept), Info(size, jnp.zeros_like(moved), lower_gradient_norm=slope)

    def estimate(self, fed: Federation, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        lam, _ = self.hessian_step(fed, self.init(x, y))
        y = self.lower_loop(fed, x, y)
        return fed.average(self.local_hypergradient, x, y, lam), y

    def upper(self, client: Client, x: PyTree, y: PyTree, lam: Any) -> PyTree:
        """Plain steps on x along the client's own hypergradients."""
        along = lambda s: lambda z: self.local_hypergradient(client, z, y, lam, s)
        return local_descent(along, x, self.outer_lr, self.outer_steps)


class LFedNest(_LocalHypergradient, LocalLower):
    """LFedNest (Tarzanagh et al., ICML 2022): T+1 rounds; biased where clients differ. The arguments are `FedNest`'s."""

    about: ClassVar[About] = About(
        name="lfednest",
        rounds="T+1",
        when="clients are alike and rounds very dear; off the solution where they differ",
        hypergradient="biased where clients differ",
        lower="beside y* for two or more `local_steps`",
        biased=True,
    )


class LFedNestSVRG(_LocalHypergradient, CorrectedLower):
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
