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

`same_cohort` asks one cohort in all exchanges of an iteration. Rounds and bytes stay the same; but factors of one cohort are
not independent, which leaves a bias that does not shrink with N.

`truncation="full"` (ours) sums all terms by Horner's rule in the same rounds, without the variance of Q:
z_t = z_{t-1} - lam (H_t z_{t-1} - d_y f(x, y^t)), z_{-1} = 0, and v = z_N; about twice the Hessian-vector products.

Floats per client: down (2N+4) dx + (4N-Q+5) dy, up 2N dy + (N-Q+1) dy + 2 dx ("full": as Q = 0).

Ours too, each an option, off by default:

`warm_start_v` ("full" only): the recursion starts from the last iteration's z_N instead of 0 and so never ends; v follows
v* as y follows y*. One dy more down. The largest gain known. `vector_growth` is not measured (zero).

`one_round`: control variates c_i at the clients and c = mean c_i at the server, both 0 at first; N+3 rounds:

    corrected   a_i = d_y g_i(x, y^t);  y_i = y^t, then steps y_i -= inner_lr [d_y g_i(x, y_i) - c_i + c]
                up y_i - y^t, a_i - c_i and r_i;  c_i <- a_i
                y^{t+1} = y^t + mean (y_i - y^t),  c += sum of p_i (a_i - c_i) over those who answered

y* is still the fixed point, with cohorts too. The gradient at y^t is a_i and the first local step, on the same rows. In the
loop down N (dx + 2 dy) and up 2 N dy, and r as above; in all, down (N+4) dx + (3N-Q+5) dy, up 2N dy + (N-Q+1) dy + 2 dx.

`independent_cohorts`: a second cohort answers r in the same round: without the bias named above, for twice the clients
asked. Down (N-Q) (dx + dy) more: x and y^t once more for each r that is made in the loop; up the same.

`estimate` starts v and c at 0: it is for clients at their start, not for use in the `step` of another algorithm with these.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax.tree
from jaxtyping import PyTree

from ..algorithm import About, option
from ..errors import check
from ..federation import Client, Reply, When
from .curvature import keeping, residual
from .directions import hessian_factor, inner_gradient
from .parts import CorrectedLower, CorrectedUpper, one_cohort
from .steps import controlled_descent, growth, moved_mean, norm


class AggITD(CorrectedUpper, CorrectedLower):
    """Aggregated iterative differentiation (Xiao & Ji, ICML 2023), 2 `inner_rounds` + 3 rounds an iteration.

    Args:
        inner_rounds: N >= 1, the turns of the lower loop.
        inner_lr: the step of ONE local lower step.
        local_steps: local lower steps a turn.
        hessian_lr: lam of the Hessian factors (I - lam H); diverges from 2 / (largest curvature of g) on. "auto"
            measures that curvature (ours; up to five rounds every 20 iterations, at first more often).
        outer_lr: the step of ONE local upper step.
        outer_steps: local upper steps an iteration.
        batch_size: rows of a minibatch, fresh for every factor; None for all rows.
        truncation: "uniform" (the paper's random Q), "full" (all terms summed), or an int that fixes Q in 0..N (a
            test device: its mean over Q is the estimator, a single one is not).
        skip_idle_rounds: leave out rounds in which one local step adds nothing.
        same_cohort: one cohort for all exchanges of an iteration, instead of a fresh one for each; biased, see above.
        outer_optimizer: an optax transformation applied at the server to x - mean x_i, or its name and learning rate as in
            "adam:0.01"; None: the mean itself.
        warm_start_v, one_round, independent_cohorts: ours, see above.
    """

    about: ClassVar[About] = About(
        name="aggitd",
        rounds="2N+3",
        when="rounds are dear and clients differ; N = 1 with truncation=full to start with",
        hypergradient="right where clients differ",
        lower="at y* for any `local_steps`",
        exact={"inner_rounds": 600},
    )

    warm_start_v: bool = option(False)
    one_round: bool = option(False)
    independent_cohorts: bool = option(False)

    def __check_init__(self):
        self.truncation.check_range("AggITD", self.inner_rounds)
        apart = not (self.same_cohort and self.independent_cohorts)
        check(apart, "AggITD takes same_cohort or independent_cohorts, for they contradict each other: use one.")
        good = self.truncation.full or not self.warm_start_v
        check(good, "AggITD(warm_start_v=True) goes on with the last sum of all terms: add truncation='full'.")

    def keeps(self, x, y):
        zeros = {"v": self.warm_start_v, "control": self.one_round}
        kept = super().keeps(x, y) | {name: optax.tree.zeros_like(y) for name, used in zeros.items() if used}
        return kept | ({"pull": jnp.zeros_like(norm(y))} if self.warm_start_v else {})

    def client_init(self, x, y):
        return optax.tree.zeros_like(y) if self.one_round else None

    def estimate_parts(self, fed, state):
        if self.one_round:
            good = not fed.weighted or fed.cohort_size == fed.clients
            check(good, "AggITD(one_round=True) with weighted clients needs all of them: leave cohort= out.")
        lam, kept = self.hessian_step(fed, state)
        cohort = one_cohort(fed, self.same_cohort)
        x, N, full = state.x, self.inner_rounds, self.truncation.full
        Q = jnp.zeros((), jnp.int32) if full else self.truncation.draw(fed, N)
        exists = lambda t: True if self.warm_start_v else t > Q  # r^{t-1}; and r^t from Q on

        def turn(t, loop):
            y, control, r, last, first, _ = loop
            moved, control, new = self._turn(fed, x, y, control, fed.when(exists(t), r), t >= Q, lam, cohort)
            last, first = self._measure(r, new, last, first, t == Q)
            slope = norm(optax.tree.sub(moved, y)) / (self.inner_lr * self.local_steps)
            return moved, control, new, last, first, slope

        zero = jnp.zeros_like(norm(state.y))
        r = kept["v"] if self.warm_start_v else optax.tree.zeros_like(state.y)
        loop = (state.y, kept.get("control"), r, zero, zero, zero)
        y, control, r, last, first, slope = fed.repeat(N, turn, loop)
        new = fed.average(self.vector, x, y, fed.when(exists(N), r), lam, cohort=cohort)
        last, first = self._measure(r, new, last, first, jnp.asarray(N) == Q)
        v = new if full else optax.tree.scale(self.lam(lam) * (N + 1), new)
        h = fed.average(self.hypergradient, x, y, v, cohort=cohort)
        kept = {**kept} | ({"v": v} if self.warm_start_v else {}) | ({"control": control} if self.one_round else {})
        if self.warm_start_v:  # its increments begin near zero: their growth would tell nothing
            stretched = jnp.zeros_like(zero)
            step = self.lam(lam)
            lag, kept = residual(kept, last / step, first / step)
        else:  # Horner's increments are -lam (H z - d_y f); a random term has no residual
            stretched = growth(last, first)
            lag = stretched if full else None
        told = {"vector_growth": stretched, "vector_residual": lag, "lower_gradient_norm": slope}
        return h, v, told, keeping(x, y, kept), cohort

    def _turn(self, fed, x, y, control, r, now, lam, cohort):
        """One turn of the lower loop: (the next y, the next control variate, r^t if `now`)."""
        apart = lambda: fed.average(self.vector_apart, fed.when(now, (x, y)), r, lam, replies=(now,), beside=True)
        if self.one_round:
            if self.independent_cohorts:
                step, change = fed.average(self.corrected, x, y, control, cohort=cohort)
                control = moved_mean(control, fed.share, change)
                new = apart()
            else:
                message = (x, y, control, r, lam)
                sent = (True, True, now)
                step, change, new = fed.average(self.corrected_anchor, *message, replies=sent, cohort=cohort)
                control = moved_mean(control, fed.share, change)
            return optax.tree.add(y, step), control, new
        if self.independent_cohorts:
            q, new = fed.average(self.gradient, x, y, cohort=cohort), apart()
        else:
            q, new = fed.average(self.anchor, x, y, r, lam, replies=(True, now), cohort=cohort)
        return self.lower_round(fed, x, y, q, cohort), control, new

    def _measure(self, r, new, last, first, starting):
        """Norms of the latest and of the first vector that Hessian factors act on ("full": of Horner's increments)."""
        size = norm(optax.tree.sub(new, r)) if self.truncation.full else norm(new)
        return size, jnp.where(starting, size, first)

    # The clients' side ----------------------------------------------------------------------------------------------

    def anchor(self, client: Client, x: PyTree, y: PyTree, r: When, lam: Any) -> tuple[PyTree, PyTree]:
        """q_i = d_y g_i(x, y^t), and r_i where wanted."""
        rows = client.batches("inner", self.batch_size, 2, at=x)
        q = client.problem.inner_gradient(x, y, rows(0))
        return q, self._if_wanted(client, x, y, r, lam, lambda: rows(1))

    def corrected(self, client: Client, x: PyTree, y: PyTree, c: PyTree) -> Reply:
        """Steps on y corrected by control variates: y_i - y and a_i - c_i; the client keeps a_i = d_y g_i(x, y)."""
        rows = client.batches("inner", self.batch_size, self.local_steps, at=x)
        step, change, a = self._corrected(client, x, y, c, rows)
        return Reply((step, change), a)

    def corrected_anchor(self, client: Client, x: PyTree, y: PyTree, c: PyTree, r: When, lam: Any) -> Reply:
        """`corrected`, and r_i where wanted."""
        rows = client.batches("inner", self.batch_size, self.local_steps + 1, at=x)
        step, change, a = self._corrected(client, x, y, c, rows)
        own = lambda: rows(self.local_steps)  # a draw that no local step takes: every factor has rows of its own
        return Reply((step, change, self._if_wanted(client, x, y, r, lam, own)), a)

    def vector(self, client: Client, x: PyTree, y: PyTree, r: When, lam: Any) -> PyTree:
        """r_i at y^N."""
        return self._vector(client, x, y, r, lam, lambda: client.batch("inner", self.batch_size, 1))

    def vector_apart(self, client: Client, at: When, r: When, lam: Any) -> PyTree:
        """r_i where wanted, asked of a second cohort; `at` is (x, y^t)."""
        x, y = at.value
        return self._if_wanted(client, x, y, r, lam, lambda: client.batch("inner", self.batch_size, 1), place=0)

    def _corrected(self, client, x, y, c, rows):
        gradient = lambda s: inner_gradient(client.problem, x, rows(s))
        a = gradient(0)(y)
        correction = optax.tree.sub(c, client.state)
        moved = controlled_descent(gradient, y, a, correction, self.inner_lr, self.local_steps)
        return optax.tree.sub(moved, y), optax.tree.sub(a, client.state), a

    def _if_wanted(self, client, x, y, r, lam, inner, place=-1):
        make = lambda: self._vector(client, x, y, r, lam, inner)
        return jax.lax.cond(client.wanted[place], make, lambda: optax.tree.zeros_like(r.value))

    def _vector(self, client, x, y, r, lam, inner):
        def start():
            return client.problem.outer_gradients(x, y, client.batch("outer", self.batch_size))[1]

        def factor():
            return hessian_factor(client.problem, x, y, r.value, self.lam(lam), inner())

        if self.truncation.full:  # Horner: (I - lam H) z + lam d_y f
            scaled = optax.tree.scale(self.lam(lam), start())
            return jax.lax.cond(r.present, lambda: optax.tree.add(factor(), scaled), lambda: scaled)
        return jax.lax.cond(r.present, factor, start)
