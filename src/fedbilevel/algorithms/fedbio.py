"""FedBiO, FedBiOAcc and FedBiOAccLocal: local steps on x, y and v, averaged once a round.

After Li, Huang & Huang, "Communication-Efficient Federated Bilevel Optimization with Global and Local Lower Level Problems",
NeurIPS 2023, arXiv 2302.06701. The equations are REMEMBERED, not verified. One round for `local_steps` local steps.

FedBiO: z_i <- z_i - (outer_lr, inner_lr, hessian_lr) D_i(z_i), `local_steps` times, and the mean of z_i, with

    D_i(z) = ( d_x f_i - d2_xy g_i v,   d_y g_i,   d2_yy g_i v - d_y f_i )        at z = (x, y, v)

that is u = v on the quadratic u'Hu/2 - u'd_y f. It is SimFBO with a server step of one. Floats: down and up dx + 2 dy each.

FedBiOAcc: the same along STORM estimates of D, as in `tracking`. Floats: down and up 2 dx + 4 dy each, and one number down.

FedBiOAccLocal solves ANOTHER problem, that of a lower level within each client:

    min_x mean_i f_i(x, y_i*(x)),   y_i*(x) = argmin_y g_i(x, y)

y_i, v_i and their estimates stay at the client; x and its estimate are averaged. Here the clients' own hypergradients are
exact, and so is their mean. Floats: down 2 dx + 1, up 2 dx; with an automatic step one more up, |v_i|, by
whose mean it is seen that the step is too large.

`solve` returns every client's y_i (`result.clients_y`), and as y their mean by the clients' weights.
Over a network y_i stay at the sites: each writes its own to `lower.npz` in its folder, and their mean
is known only where `share_lower` has clients send how far y_i went (dy more up, in the same round):
y <- y + share * mean of these moves, with the share of all clients that answered. So the state's y
follows the mean over ALL clients, exactly. (Where cohorts are drawn in proportion to unequal weights no
share does that, and `share_lower` is refused.) Without it the state's y stays at its start, which is no
result.
"""

from __future__ import annotations

from typing import Any, ClassVar, final

import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Float, PyTree

from .. import algorithm
from ..algorithm import About, Algorithm, Info, component, count, option, rate
from ..errors import check
from ..federation import Client, Federation, Reply
from .components.curvature import AutoStep, Curvature, Rate
from .components.directions import direction
from .components.simultaneous import LocalRounds, along, told
from .components.steps import moved_mean, norm, tracked_descent
from .curvature import keeping
from .tracking import Tracking


class State(algorithm.State):
    """z = (x, y, v).

    Attributes:
        v: the adjoint, like y.
        pull: |d_y f| of the first iteration, to which the residual of v is compared.
        curvature: what `hessian_lr="auto"` remembers.
    """

    v: PyTree
    pull: Float[Array, ""]
    curvature: Curvature | None


@final
class FedBiO(Algorithm):
    """FedBiO (NeurIPS 2023; equations remembered): x, y, v by local steps, averaged; a floor for two or more of them.

    Args:
        inner_lr, hessian_lr, outer_lr: the step of ONE local step of y, of v and of x. `hessian_lr="auto"` measures the
            curvature (ours; up to five rounds every 20 iterations, at first more often).
        local_steps: local steps a round.
        batch_size: rows of a minibatch, fresh for every local step; None for all rows.
    """

    about: ClassVar[About] = About(
        name="fedbio",
        rounds="1",
        when="simfbo with a server step of one",
        hypergradient="right with one local step; else off by the order of the steps",
        lower="the same",
    )

    hessian_lr: Rate | str = rate(0.01, "auto")
    batch_size: int | None = count(None)
    inner_lr: Rate = rate(0.01)
    local_steps: int = count(5)
    outer_lr: Rate = rate(0.05)

    @component
    def hessian(self) -> AutoStep:
        """The step of v: from single clients' curvature, where they take several steps between two means."""
        return AutoStep(self.hessian_lr, self.batch_size, self.local_steps > 1)

    @component
    def rounds(self) -> LocalRounds:
        """The clients' local steps."""
        return LocalRounds(self.hessian, direction, self.outer_lr, self.inner_lr, self.local_steps, self.batch_size)

    def init(self, x: PyTree, y: PyTree) -> State:
        return State(x, y, optax.tree.zeros_like(y), jnp.zeros_like(norm(y)), self.hessian.begin(y))

    def step(self, fed: Federation, state: State) -> tuple[State, Info]:
        lam, memory = self.hessian.ask(fed, state.x, state.y, state.curvature)
        z = state.x, state.y, state.v
        moved = fed.average(self.rounds.moves, *z, lam)
        x, y, v = optax.tree.add(z, moved)
        info, pull = self.rounds.told(moved, lam, state.pull)
        return State(x, y, v, pull, self.hessian.watch(memory, v)), info


class FedBiOAcc(Tracking):
    """FedBiOAcc (NeurIPS 2023; equations remembered): FedBiO along STORM estimates, with falling steps.

    Args:
        inner_lr, hessian_lr, outer_lr: the step of the FIRST local steps of y, of v and of x; later ones are a_t of it.
            `hessian_lr="auto"` measures the curvature (ours).
        local_steps: local steps a round.
        batch_size: rows of a minibatch, fresh for every local step; None for all rows.
        forget: how much of the estimate a local step forgets at first; at most 1.
        slow_after: after how many local steps the steps have fallen to 0.79 (2^{-1/3}).
    """

    about: ClassVar[About] = About(
        name="fedbioacc",
        rounds="1",
        when="minibatches: directions followed by STORM",
        hypergradient="as SimFBO's, along STORM estimates with falling steps",
        lower="the same",
    )

    @property
    def local_factors(self):
        return self.local_steps > 1

    def point(self, state, kept):
        return state.x, state.y, kept["v"]

    def rates(self, lam):
        return self.outer_lr, self.inner_lr, self.lam(lam)

    def along(self, client, lam):
        return along(client, self.batch_size)


class FedBiOAccLocal(FedBiOAcc):
    """FedBiOAccLocal (NeurIPS 2023; equations remembered): each client has a lower level of its own; only x is shared.

    Args:
        share_lower: send how y_i moves too: so a network's server knows the mean of all y_i, for
            metrics and the result.

    The other arguments are `FedBiOAcc`'s.
    """

    about: ClassVar[About] = About(
        name="fedbioacc-local",
        rounds="1",
        when="another problem: every client has a lower level of its own",
        hypergradient="another problem's: each client has a lower level of its own",
        lower="at the client's own y*",
    )

    share_lower: bool = option(False)

    @component
    def hessian(self):
        """It measures at the clients' own y_i: the server does not know them."""
        return AutoStep(self.hessian_lr, self.batch_size, True, _own_lower)

    def own_lower(self, state):
        return _own_lower(state)

    @property
    def local_factors(self):
        return True

    @property
    def shares_lower(self):
        return self.share_lower

    def keeps(self, x, y):
        kept = super().keeps(x, y)
        kept.pop("v")
        return {**kept, "estimate": optax.tree.zeros_like(x)}

    def client_init(self, x, y):
        lower = (y, optax.tree.zeros_like(y))
        return {"lower": lower, "estimate": optax.tree.zeros_like(lower), "time": jnp.zeros((), jnp.int32)}

    def step(self, fed, state):
        known = not self.share_lower or not fed.weighted or fed.cohort_size == fed.clients
        check(
            known,
            "FedBiOAccLocal(share_lower=True) cannot follow the mean of all clients' y where cohorts are drawn in "
            "proportion to unequal weights: ask everyone, or leave it out (a simulation knows every client's y anyway).",
        )
        lam, kept = self.hessian_step(fed, state)
        t = kept["time"]
        moved, e, *rest = fed.average(self.own_moves, state.x, kept["estimate"], t, lam)
        size = rest.pop() if self.measures_curvature else None
        after = {**kept, "estimate": e, "time": t + self.local_steps}
        y = moved_mean(state.y, fed.share, rest[0]) if rest else state.y
        x, info = optax.tree.add(state.x, moved), told(moved, self.outer_lr * self.local_steps)
        return keeping(x, y, self.watch(after, size)), info

    def own_moves(self, client: Client, x: PyTree, e: PyTree, t: Any, lam: Any) -> Reply:
        """The same with the client's own y_i and v_i, which stay."""
        own = client.state
        z, estimate = (x, *own["lower"]), (e, *own["estimate"])
        gradient, fresh = self.along(client, lam), own["time"] == 0
        move, renew = self.turns(gradient, t, lam, None)

        def look(s, before, after, e):
            """A client that is asked for the first time has no estimate of its own yet."""
            known = renew(s, before, after, e)
            seen = gradient(s)(after)
            first = jnp.where(fresh & (s == 0), 1.0, 0.0)
            return known[0], *(optax.tree.add_scale(known[k], first, optax.tree.sub(seen[k], known[k])) for k in (1, 2))

        (end, *lower), (e, *rest) = tracked_descent(z, estimate, move, look, self.local_steps)
        state = {"lower": tuple(lower), "estimate": tuple(rest), "time": own["time"] + self.local_steps}
        reply = optax.tree.sub(end, x), e
        shared = (optax.tree.sub(lower[0], own["lower"][0]),) if self.share_lower else ()
        size = (norm(lower[1]),) if self.measures_curvature else ()
        return Reply((*reply, *shared, *size), state)


def _own_lower(state: PyTree) -> PyTree:
    """The client's y in what it keeps."""
    return state["lower"][0]
