"""FedMSA: x, y and v together, two rounds an iteration: STORM across iterations, SARAH within.

After Shen, Tarzanagh, Li, Thrampoulidis & Oymak, "Federated Multi-Sequence Stochastic Approximation with Local Hypergradient
Estimation", ICML 2023, arXiv 2306.01648, as read in its public code. With z = z_r, e = e_r and

    D_i(z) = ( d_x f_i - d2_xy g_i v,   d_y g_i,   d2_yy g_i v - d_y f_i )        at z = (x, y, v)

    look      all clients: e_i = D_i(z_r) + (1 - forget) [e_{r-1} - D_i(z_{r-1})], on the same rows        e_r = mean e_i
    move      a cohort: z_i = z_r, e_i = e_r, `local_steps` times
                  z' = z_i - (outer_lr, inner_lr, hessian_lr) e_i,   e_i += D_i(z') - D_i(z_i) on the same rows, z_i = z'
              z_{r+1} = mean z_i

The local corrections start at the global e_r, so that nothing moves where e_r = D(z_r) = 0: the solution is the fixed point
for any number of local steps and any clients. In the first iteration e_0 = mean D_i(z_0).

Floats per client: round one down 3 dx + 6 dy + 1, up dx + 2 dy, asked of ALL clients; round two down 2 dx + 4 dy, up
dx + 2 dy.
"""

from __future__ import annotations

from typing import ClassVar, final

import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Float, Int, PyTree

from .. import algorithm
from ..algorithm import About, Algorithm, Info, component, count, rate
from ..errors import check
from ..federation import Client, Federation
from ..pace.curvature import AutoStep, Curvature, Rate, number
from .components.diagnostics import of_each, residual
from .components.simultaneous import along
from .components.steps import descend, norm, storm, tracked_descent


class State(algorithm.State):
    """z_r, and the estimate of D that follows it.

    Attributes:
        v: the adjoint, like y.
        pull: |d_y f| of the first iteration, to which the residual of v is compared.
        before: z_{r-1}.
        estimate: e_{r-1}, like z.
        done: how many iterations there were.
        curvature: what `hessian_lr="auto"` remembers.
    """

    v: PyTree
    pull: Float[Array, ""]
    before: PyTree
    estimate: PyTree
    done: Int[Array, ""]
    curvature: Curvature | None


@final
class FedMSA(Algorithm):
    """FedMSA (ICML 2023): x, y, v in two rounds, no floor from local steps; the first round asks all clients.

    Args:
        inner_lr, hessian_lr, outer_lr: the step of ONE local step of y, of v and of x. `hessian_lr="auto"` measures the
            curvature (ours).
        local_steps: local steps an iteration.
        batch_size: rows of a minibatch, fresh for every local step; None for all rows.
        forget: how much of the estimate an iteration forgets (rho); at most 1.
    """

    about: ClassVar[About] = About(
        name="fedmsa",
        rounds="2",
        when="all clients can be asked each iteration; many local steps without a floor",
        hypergradient="right where clients differ; never formed for its own sake",
        lower="at y* for any `local_steps`",
        asks="all",
    )

    follows: ClassVar[dict[str, str]] = Algorithm.follows | of_each("before", "estimate")

    hessian_lr: Rate | str = rate("auto", "auto")
    batch_size: int | None = count(None)
    inner_lr: Rate | str = rate("auto", "auto")
    local_steps: int = count(5)
    outer_lr: Rate | str = rate("auto", "auto")
    forget: Rate = rate(0.5)

    def __check_init__(self):
        good = not isinstance(self.forget, float) or self.forget <= 1
        check(good, f"FedMSA(forget=...) is a share, at most 1; got {self.forget!r}.")

    @component
    def hessian(self) -> AutoStep:
        """The step of v: from single clients' curvature, where they take several steps between two means."""
        return AutoStep(self.hessian_lr, self.batch_size, self.local_steps > 1)

    def init(self, x: PyTree, y: PyTree) -> State:
        v = optax.tree.zeros_like(y)
        z, pull, done = (x, y, v), jnp.zeros_like(norm(y)), jnp.zeros((), jnp.int32)
        return State(*z, pull, z, optax.tree.zeros_like(z), done, self.hessian.begin(y))

    def step(self, fed: Federation, state: State) -> tuple[State, Info]:
        lam, memory = self.hessian.ask(fed, state.x, state.y, state.curvature)
        z = state.x, state.y, state.v
        forget = jnp.where(state.done == 0, 1.0, self.forget)
        everyone = fed.draw_cohort(fed.clients)
        e = fed.average(self.look, z, state.before, state.estimate, forget, cohort=everyone)
        e = fed.renewed(e, state.estimate)
        x, y, v = optax.tree.add(z, fed.average(self.move, z, e, lam))
        lag, pull = residual(state.pull, norm(e[2]))
        after = State(x, y, v, pull, z, e, state.done + 1, self.hessian.watch(memory, v))
        return after, Info(norm(e[0]), None, lag, norm(e[1]))

    def look(self, client: Client, z: PyTree, before: PyTree, e: PyTree, forget: Float[Array, ""]) -> PyTree:
        """e_i at z."""
        return storm(along(client, self.batch_size)(0), before, z, e, forget)

    def move(self, client: Client, z: PyTree, e: PyTree, lam: Float[Array, ""] | None) -> PyTree:
        """How far the client's steps go from z."""
        gradient, steps = (
            along(client, self.batch_size),
            (number(self.outer_lr), number(self.inner_lr), self.hessian.lam(lam)),
        )
        move = lambda s, z, e: descend(z, steps, e)
        renew = lambda s, before, after, e: storm(gradient(s), before, after, e, 0.0)
        end, _ = tracked_descent(z, e, move, renew, self.local_steps)
        return optax.tree.sub(end, z)
