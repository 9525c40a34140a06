"""AggITD: hypergradient estimation in the rounds of the lower loop. 2N+3 rounds an iteration, N = `inner_rounds`.

After Xiao & Ji, "Communication-Efficient Federated Hypergradient Computation via Aggregated Iterative
Differentiation", ICML 2023, arXiv 2302.04969. The text of the paper was not available: the estimator below is a
reconstruction that agrees with every fact known of it, with the index convention Q in {0..N}. With lam = hessian_lr,
Q ~ Uniform{0..N} drawn by the server, y^0 the last iteration's y^N:

    for t = 0..N-1:
      anchor      q = mean d_y g_i(x, y^t)
                  r^Q = mean d_y f_i(x, y^Q)                                  if t = Q
                  r^t = mean (I - lam d2_yy g_i(x, y^t)) r^{t-1}              if t > Q
      lower       y^{t+1} = mean of y_i: FedSVRG steps with inner_lr from y^t around q
    vector        r^N
    hypergradient h = mean d_x f_i(x, y^N) - d2_xy g_i(x, y^N) v,   v = lam (N+1) r^N
    upper         x = mean of x_i: FedSVRG steps with outer_lr around h, y^N and v fixed

Every mean is one round with a fresh cohort and fresh rows. On a quadratic g with H = d2_yy g, A = d2_yy f, M = I - lam H
and lower error map P:   E[v] - v* = -M^{N+1} v* + lam sum_{q=0}^{N} M^{N-q} A P^q (y^0 - y*).

The vector r is answered by the clients that also answer q, which moves y: on a non-quadratic g that leaves a bias of
order inner_lr * hessian_lr (a few per cent in a toy problem, whatever N), with sampled clients or rows only.

`truncation="full"` (ours) sums all terms by Horner's rule in the same rounds, without the variance of Q:
z_t = z_{t-1} - lam (H_t z_{t-1} - d_y f(x, y^t)), z_{-1} = 0, and v = z_N; about twice the Hessian-vector products.

Floats per client: down (2N+4) dx + (4N-Q+5) dy, up 2N dy + (N-Q+1) dy + 2 dx ("full": as Q = 0).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax.tree
from jaxtyping import PyTree

from ..federation import Client, When
from .parts import CorrectedLower, CorrectedUpper, Settings, growth, hessian_factor, norm


class AggITD(Settings, CorrectedLower, CorrectedUpper):
    """Aggregated iterative differentiation (Xiao & Ji, ICML 2023), 2 `inner_rounds` + 3 rounds an iteration.

    Args:
        inner_rounds: N >= 1, the turns of the lower loop.
        inner_lr: the step of ONE local lower step.
        local_steps: local lower steps a turn.
        hessian_lr: lam of the Hessian factors (I - lam H); diverges from 2 / (largest curvature of g) on.
        outer_lr: the step of ONE local upper step.
        outer_steps: local upper steps an iteration.
        batch_size: rows of a minibatch, fresh for every factor; None for all rows.
        truncation: "uniform" (the paper's random Q), "full" (all terms summed), or an int that fixes Q in 0..N (a
            test device: its mean over Q is the estimator, a single one is not).
        skip_idle_rounds: leave out rounds in which one local step adds nothing.
    """

    def __check_init__(self):
        self.truncation.check_range("AggITD", self.inner_rounds)

    def estimate_parts(self, fed, x, y):
        N, full = self.inner_rounds, self.truncation.full
        Q = jnp.zeros((), jnp.int32) if full else self.truncation.draw(fed, N)
        started = lambda t: (t > Q, t >= Q)  # whether r^{t-1} exists, whether r^t does

        def turn(t, loop):
            y, r, last, first = loop
            before, now = started(t)
            q, new = fed.average(self.anchor, x, y, fed.when(before, r), replies=(True, now))
            last, first = self._measure(r, new, last, first, t == Q)
            return self.lower_round(fed, x, y, q), new, last, first

        zero = jnp.zeros_like(norm(y))
        y, r, last, first = fed.repeat(N, turn, (y, optax.tree.zeros_like(y), zero, zero))
        before, _ = started(N)
        new = fed.average(self.vector, x, y, fed.when(before, r))
        last, first = self._measure(r, new, last, first, jnp.asarray(N) == Q)
        v = new if full else optax.tree.scale(self.hessian_lr * (N + 1), new)
        return fed.average(self.hypergradient, x, y, v), y, v, growth(last, first)

    def _measure(self, r, new, last, first, starting):
        """Norms of the latest and of the first vector that Hessian factors act on ("full": of Horner's increments)."""
        size = norm(optax.tree.sub(new, r)) if self.truncation.full else norm(new)
        return size, jnp.where(starting, size, first)

    # The clients' side ----------------------------------------------------------------------------------------------

    def anchor(self, client: Client, x: PyTree, y: PyTree, r: When) -> tuple[PyTree, PyTree]:
        """q_i = d_y g_i(x, y^t), and r_i where wanted."""
        rows = client.batches("inner", self.batch_size, 2, at=x)
        new = jax.lax.cond(
            client.wanted[1], lambda: self._vector(client, x, y, r, rows(1)), lambda: optax.tree.zeros_like(r.value)
        )
        return client.problem.inner_gradient(x, y, rows(0)), new

    def vector(self, client: Client, x: PyTree, y: PyTree, r: When) -> PyTree:
        """r_i at y^N."""
        return self._vector(client, x, y, r, client.batch("inner", self.batch_size, 1))

    def _vector(self, client, x, y, r, inner):
        # `inner` is draw 1, for draw 0 makes q_i: every factor has rows of its own
        def start():
            return client.problem.outer_gradients(x, y, client.batch("outer", self.batch_size))[1]

        def factor():
            return hessian_factor(client.problem, x, y, r.value, self.hessian_lr, inner)

        if self.truncation.full:  # Horner: (I - lam H) z + lam d_y f
            scaled = optax.tree.scale(self.hessian_lr, start())
            return jax.lax.cond(r.present, lambda: optax.tree.add(factor(), scaled), lambda: scaled)
        return jax.lax.cond(r.present, factor, start)
