"""FedMSA: x, y and v together, two rounds an iteration: STORM across iterations, SARAH within.

After Shen, Tarzanagh, Li, Thrampoulidis & Oymak, "Federated Multi-Sequence Stochastic Approximation with Local Hypergradient
Estimation", ICML 2023, arXiv 2306.01648, as read in its public code. With D_i(z) as in `simultaneous`, z = z_r and e = e_r:

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

from typing import Any, ClassVar

import jax.numpy as jnp
import optax.tree
from jaxtyping import PyTree

from ..algorithm import About, Info, rate
from ..errors import check
from ..federation import Client, Federation
from .components.steps import descend, norm, storm, tracked_descent
from .curvature import keeping, of_each, residual
from .simultaneous import Simultaneous, along


class FedMSA(Simultaneous):
    """FedMSA (ICML 2023): x, y, v in two rounds, no floor from local steps; the first round asks all clients.

    Args:
        inner_lr, hessian_lr, outer_lr: the step of ONE local step of y, of v and of x. `hessian_lr="auto"` measures the
            curvature (ours; up to five rounds every 20 iterations, at first more often).
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

    follows: ClassVar[dict[str, str]] = Simultaneous.follows | of_each("before", "estimate")

    forget: Any = rate(0.5)

    def __check_init__(self):
        good = not isinstance(self.forget, float) or self.forget <= 1
        check(good, f"FedMSA(forget=...) is a share, at most 1; got {self.forget!r}.")

    def keeps(self, x, y):
        kept = super().keeps(x, y)
        z = x, y, kept["v"]
        return kept | {"before": z, "estimate": optax.tree.zeros_like(z), "done": jnp.zeros((), jnp.int32)}

    def step(self, fed: Federation, state):
        lam, kept = self.hessian_step(fed, state)
        z = state.x, state.y, kept["v"]
        forget = jnp.where(kept["done"] == 0, 1.0, self.forget)
        everyone = fed.draw_cohort(fed.clients)
        e = fed.average(self.look, z, kept["before"], kept["estimate"], forget, cohort=everyone)
        x, y, v = optax.tree.add(z, fed.average(self.move, z, e, lam))
        after = {**kept, "v": v, "before": z, "estimate": e, "done": kept["done"] + 1}
        lag, after = residual(after, norm(e[2]))
        return keeping(x, y, self.watch(after)), Info(norm(e[0]), jnp.zeros_like(norm(y)), lag, norm(e[1]))

    def look(self, client: Client, z: PyTree, before: PyTree, e: PyTree, forget: Any) -> PyTree:
        """e_i at z."""
        return storm(along(client, self.batch_size)(0), before, z, e, forget)

    def move(self, client: Client, z: PyTree, e: PyTree, lam: Any) -> PyTree:
        """How far the client's steps go from z."""
        gradient, steps = along(client, self.batch_size), self.rates(lam)
        move = lambda s, z, e: descend(z, steps, e)
        renew = lambda s, before, after, e: storm(gradient(s), before, after, e, 0.0)
        end, _ = tracked_descent(z, e, move, renew, self.local_steps)
        return optax.tree.sub(end, z)
