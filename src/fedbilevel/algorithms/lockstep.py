"""Lockstep: x, y and the adjoint v move together, in ONE round an iteration, corrected by control variates.

Ours, not a paper's. That all three variables move at once is SimFBO's idea (NeurIPS 2023, arXiv 2305.19442); control
variates against the drift of local steps are SCAFFOLD's (Karimireddy et al., ICML 2020). With z = (x, y, v) and

    D_i(z) = ( d_x f_i - d2_xy g_i v,   d_y g_i,   d2_yy g_i v - d_y f_i )

the mean D over clients is zero where y = y*(x), v = v*(x) = H^-1 d_y f and grad Phi(x) = 0. Each factor is averaged before
it is composed, since v and y are the same for every client. Client i keeps c_i, the server c = mean c_i over ALL clients;
all of them, and v, are 0 at first. One iteration, one round, with a fresh cohort:

    moves      a_i = D_i(x, y, v)
               y_i = y, `local_steps` times   y_i -= inner_lr [d_y g_i(x, y_i) - c_i + c]
               v_i = v - hessian_lr [a_i - c_i + c]
               x_i = x, `outer_steps` times   x_i -= outer_lr [d_x f_i(x_i, y) - d2_xy g_i(x_i, y) v - c_i + c]
               up z_i - z and a_i - c_i;  c_i <- a_i
    server     z += mean (z_i - z),   c += sum of p_i (a_i - c_i) over those who answered

(c_i and c stand for their part of z.) The first local step is along a_i, on the same rows. Within an iteration x, y and v do
not see each other's steps: local steps on x along a client's own y_i would follow its own classes, not everybody's.

Where D(z) = 0, c_i = D_i(z) and c = 0 nothing moves, whatever the clients, the local steps and the cohorts: no floor from
heterogeneity, and none from cohorts as long as rows are not sampled. On a problem whose D is linear and with everyone
asked, one local step each makes z <- z - (outer_lr, inner_lr, hessian_lr) D(z). Floats per client and round: down and up
2 dx + 4 dy each.

Hessians are never multiplied up, so there is no series to cut; v is as near to v* as y to y*, and the hypergradient is never
formed for its own sake: the algorithm has no estimator.
"""

from __future__ import annotations

from typing import ClassVar, final

import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Float, PyTree

from .. import algorithm, owned
from ..algorithm import About, Algorithm, Info, component, count, rate
from ..errors import check
from ..federation import Client, Federation, Reply
from ..pace.curvature import AutoStep, Curvature, Rate, number
from .components.anderson import Anderson, Parts, Past
from .components.diagnostics import of_each, residual
from .components.directions import hypergradient, inner_gradient
from .components.steps import controlled_descent, descend, drift, moved_mean, norm


class State(algorithm.State):
    """z and the control variates' mean.

    Attributes:
        v: the adjoint, like y.
        control: c, like (x, y, v).
        pull: |d_y f| of the first iteration, to which the residual of v is compared.
        curvature: what `hessian_lr="auto"` remembers.
        past: what `anderson=` remembers.
    """

    v: PyTree
    control: PyTree
    pull: Float[Array, ""]
    curvature: Curvature | None
    past: Past | None = None


class Told(Info):
    """`Info` with `anderson=`: `mixed` says whether earlier points were mixed (1), or the iteration was a plain one (0)."""

    mixed: Float[Array, ""] | None = None


@final
class Lockstep(Algorithm):
    """All variables in one round an iteration (ours): the fewest rounds of all that are here, and the longest messages.

    Args:
        inner_lr: the step of ONE local lower step.
        local_steps: local lower steps a round.
        hessian_lr: the step of v; diverges from 2 / (largest curvature of g) on, of any g_i where cohorts are sampled.
            "auto" measures that curvature.
        outer_lr: the step of ONE local upper step.
        outer_steps: local upper steps a round.
        batch_size: rows of a minibatch, fresh for every factor; None for all rows.
        anderson: how many earlier points the server mixes the next one from (`components.anderson`), 20 say; None: none.
            It remembers 2 (dx + 2 dy) floats for each. Where cohorts or minibatches are drawn nothing is mixed, for under
            noise it loses; the column `mixed` of the history says when it did.

    Each of the three steps is "auto" where it is not given: it is found while the algorithm runs
    (`fedbilevel.pace.automatic`). With `anderson` x has a way of its own, and `outer_lr="auto"` is 0.05.
    """

    about: ClassVar[About] = About(
        name="lockstep",
        rounds="1",
        when="the fewest rounds where clients differ; the longest messages",
        hypergradient="right where clients differ; never formed for its own sake",
        lower="at y* for any `local_steps`",
    )

    follows: ClassVar[dict[str, str]] = Algorithm.follows | of_each("control")

    hessian_lr: Rate | str = rate("auto", "auto")
    batch_size: int | None = count(None)
    inner_lr: Rate | str = rate("auto", "auto")
    local_steps: int = count(5)
    outer_lr: Rate | str = rate("auto", "auto")
    outer_steps: int = count(1)
    anderson: int | None = count(None)

    @component
    def hessian(self) -> AutoStep:
        """The step of v."""
        return AutoStep(self.hessian_lr, self.batch_size)

    @component
    def mixing(self) -> Anderson | None:
        """What mixes earlier points, if anything does."""
        return None if self.anderson is None else Anderson(self.anderson)

    @property
    def spares_unasked(self) -> bool:
        return self.anderson is None

    def init(self, x: PyTree, y: PyTree) -> State:
        zeros = optax.tree.zeros_like
        past = None if self.mixing is None else self.mixing.begin((x, y, y))
        return State(x, y, zeros(y), zeros((x, y, y)), jnp.zeros_like(norm(y)), self.hessian.begin(y), past)

    def client_init(self, x: PyTree, y: PyTree) -> PyTree:
        return optax.tree.zeros_like((x, y, y))

    def step(self, fed: Federation, state: State) -> tuple[State, Info]:
        everyone = fed.cohort_size == fed.clients
        check(everyone or not fed.weighted, "Lockstep with weighted clients needs all of them: leave cohort= out.")
        lam, memory = self.hessian.ask(fed, state.x, state.y, state.curvature)
        z, c = (state.x, state.y, state.v), state.control
        moved, change = fed.average(self.moves, *z, c, lam)
        (x, y, v), past, mixed = self._next(fed, z, moved, lam, state.past)
        direction = optax.tree.add(c, change)  # an estimate of D at the old point
        lag, pull = residual(state.pull, norm(direction[2]))
        told = norm(direction[0]), None, lag, norm(direction[1])
        info = Info(*told) if mixed is None else Told(*told, mixed)
        return State(x, y, v, moved_mean(c, fed.share, change), pull, self.hessian.watch(memory, v), past), info

    def _next(
        self, fed: Federation, z: Parts, moved: Parts, lam: Float[Array, ""] | None, past: Past | None
    ) -> tuple[Parts, Past | None, Float[Array, ""] | None]:
        """(The next z, what is remembered, whether it was mixed)."""
        if self.mixing is None or past is None:
            return optax.tree.add(z, moved), None, None
        if fed.cohort_size < fed.clients or self.batch_size is not None:  # under noise it loses
            return optax.tree.add(z, moved), past, jnp.zeros_like(norm(moved))
        steps = (
            number(self.outer_lr) * self.outer_steps,
            number(self.inner_lr) * self.local_steps,
            self.hessian.lam(lam),
        )
        share = jnp.asarray(fed.share)
        whole = share > 1 - 4 * fed.clients * jnp.finfo(share.dtype).eps  # a sum of weights, rounded
        return self.mixing.step(past, z, moved, steps, whole)

    def moves(self, client: Client, x: PyTree, y: PyTree, v: PyTree, c: PyTree, lam: Float[Array, ""] | None) -> Reply:
        """How far the client's steps go from (x, y, v), and a_i - c_i; it keeps a_i = D_i(x, y, v)."""
        problem, T = client.problem, self.local_steps
        rows = client.batches("inner", self.batch_size, T + 1, at=x)
        outer = lambda s: client.batch("outer", self.batch_size, s)
        correction = drift(c, client.state)

        along_y = lambda s: inner_gradient(problem, x, rows(s))

        def along_x(s):
            inner = client.batch("inner", self.batch_size, T + 1 + s)
            return lambda x: hypergradient(problem, x, y, v, inner, outer(s))

        pull = problem.outer_gradients(x, y, outer(self.outer_steps))[1]
        adjoint = optax.tree.sub(problem.hessian_vector(x, y, v, rows(T)), pull)
        a = along_x(0)(x), along_y(0)(y), adjoint
        ends = (
            controlled_descent(along_x, x, a[0], correction[0], number(self.outer_lr), self.outer_steps),
            controlled_descent(along_y, y, a[1], correction[1], number(self.inner_lr), T),
            descend(v, self.hessian.lam(lam), optax.tree.add(adjoint, correction[2])),
        )
        return Reply((optax.tree.sub(ends, (x, y, v)), optax.tree.sub(a, client.state)), owned.with_zeros(a))
