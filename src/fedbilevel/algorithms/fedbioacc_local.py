"""FedBiOAccLocal: each client has a lower level of its own, only x is shared; one round an iteration.

After Li, Huang & Huang, "Communication-Efficient Federated Bilevel Optimization with Global and Local Lower Level Problems",
NeurIPS 2023, arXiv 2302.06701. The equations are REMEMBERED, not verified. The local steps are FedBiOAcc's.

It solves ANOTHER problem, that of a lower level within each client:

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

from typing import ClassVar, final

import equinox as eqx
import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Int, PyTree

from .. import algorithm
from ..algorithm import About, Algorithm, Info, component, count, option, rate
from ..errors import check
from ..federation import Client, Federation, Reply
from ..pace.curvature import AutoStep, Curvature, Rate
from .components.simultaneous import along
from .components.steps import moved_mean, norm, tracked_descent
from .components.tracking import Number, Point, Scalar, Tracking, check_forget


class State(algorithm.State):
    """x, and what is known of y.

    Attributes:
        estimate: that of x's direction, like x.
        time: local steps so far.
        curvature: what `hessian_lr="auto"` remembers.
    """

    estimate: PyTree
    time: Int[Array, ""]
    curvature: Curvature | None


class Own(eqx.Module):
    """What a client keeps.

    Attributes:
        lower: its (y, v).
        estimate: of their directions.
        time: local steps so far; zero for one that was not asked yet.
    """

    lower: tuple[PyTree, PyTree]
    estimate: tuple[PyTree, PyTree]
    time: Int[Array, ""]


@final
class FedBiOAccLocal(Algorithm):
    """FedBiOAccLocal (NeurIPS 2023; equations remembered): each client has a lower level of its own; only x is shared.

    Args:
        share_lower: send how y_i moves too: so a network's server knows the mean of all y_i, for
            metrics and the result.

    The other arguments are `FedBiOAcc`'s.
    """

    paced = False  # its step is found within, where clients' own v tell when it is too large
    about: ClassVar[About] = About(
        name="fedbioacc-local",
        rounds="1",
        when="another problem: every client has a lower level of its own",
        hypergradient="another problem's: each client has a lower level of its own",
        lower="at the client's own y*",
        no_blocks="every client has a whole y of its own, and its estimates grow old while it is not asked",
    )

    hessian_lr: Rate | str = rate(0.01, "auto")  # measured in rounds of its own, and so only where it is asked for
    batch_size: int | None = count(None)
    inner_lr: Rate = rate(0.01, why="every client's y is its own")
    local_steps: int = count(5)
    outer_lr: Rate = rate(0.05, why="the clients' estimates follow x on their own way")
    forget: Rate = rate(0.1)
    slow_after: Rate = rate(1000.0)
    share_lower: bool = option(False)

    def __check_init__(self):
        check_forget(self.forget, "FedBiOAccLocal")

    @component
    def hessian(self) -> AutoStep:
        """The step of v; it measures at the clients' own y_i, which the server does not know."""
        return AutoStep(self.hessian_lr, self.batch_size, True, own_y)

    @component
    def tracking(self) -> Tracking:
        """The local steps, along STORM estimates."""
        return Tracking(self.local_steps, self.forget, self.slow_after)

    def init(self, x: PyTree, y: PyTree) -> State:
        return State(x, y, optax.tree.zeros_like(x), jnp.zeros((), jnp.int32), self.hessian.begin(y))

    def client_init(self, x: PyTree, y: PyTree) -> Own:
        lower = y, optax.tree.zeros_like(y)
        return Own(lower, optax.tree.zeros_like(lower), jnp.zeros((), jnp.int32))

    def own_lower(self, state: Own) -> PyTree:
        """The client's y in what it keeps."""
        return own_y(state)

    @property
    def shares_lower(self) -> bool:
        """Whether the server knows the mean of the y_i."""
        return self.share_lower

    def step(self, fed: Federation, state: State) -> tuple[State, Info]:
        known = not self.share_lower or not fed.weighted or fed.cohort_size == fed.clients
        check(
            known,
            "FedBiOAccLocal(share_lower=True) cannot follow the mean of all clients' y where cohorts are drawn in "
            "proportion to unequal weights: ask everyone, or leave it out (a simulation knows every client's y anyway).",
        )
        lam, memory = self.hessian.ask(fed, state.x, state.y, state.curvature)
        moved, e, *rest = fed.average(self.own_moves, state.x, state.estimate, state.time, lam)
        if memory is not None:
            memory = self.hessian.watch(memory, rest.pop())
        y = moved_mean(state.y, fed.share, rest[0]) if rest else state.y
        info = Info(norm(moved) / (self.outer_lr * self.local_steps))
        return State(optax.tree.add(state.x, moved), y, e, state.time + self.local_steps, memory), info

    def own_moves(self, client: Client, x: PyTree, e: PyTree, t: Int[Array, ""], lam: Scalar | None) -> Reply:
        """How far x goes, and its estimate; with the client's own y_i and v_i, which stay."""
        own: Own = client.state
        z, estimate = (x, *own.lower), (e, *own.estimate)
        gradient, fresh = along(client, self.batch_size), own.time == 0
        move = self.tracking.move(t, (self.outer_lr, self.inner_lr, self.hessian.lam(lam)))

        def look(s: Number, before: Point, after: Point, e: Point) -> Point:
            """A client that is asked for the first time has no estimate of its own yet."""
            known = self.tracking.renewed(gradient(s), t + s, before, after, e)
            seen = gradient(s)(after)
            first = jnp.where(fresh & (s == 0), 1.0, 0.0)
            return known[0], *(optax.tree.add_scale(known[k], first, optax.tree.sub(seen[k], known[k])) for k in (1, 2))

        (end, y, v), (e, *others) = tracked_descent(z, estimate, move, look, self.local_steps)
        after = Own((y, v), tuple(others), own.time + self.local_steps)
        shared = (optax.tree.sub(y, own.lower[0]),) if self.share_lower else ()
        size = (norm(v),) if self.hessian.measures else ()
        return Reply((optax.tree.sub(end, x), e, *shared, *size), after)


def own_y(state: Own) -> PyTree:
    """The client's y in what it keeps."""
    return state.lower[0]
