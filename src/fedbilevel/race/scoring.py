"""What candidates are worth: f at each one's x, with y where it should be.

A candidate that hurries has a y that lags behind y*(x), and an f that says nothing of x. With q = d_y g and v = H^-1 d_y f
at (x, y), f(x, y*) is f - <v, q> to first order: so much in the round that asks for f and q. Where a candidate keeps no v,
or an algorithm is about to be dropped for good, y is trained, and judged again: each turn is a round of local steps along
d_y g_i(x, y_i) - d_y g_i(x, y) + q, and one that asks for f and q. All candidates are asked in the same rounds, the same
clients, on all of their rows.
"""

from __future__ import annotations

from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Float, Int, PyTree

from ..algorithm import Algorithm, State
from ..federation import Client, Federation

TURNS = 2  # of training, where y is trained first

Each = Float[Array, " candidates"]


class Candidates(State):
    """What is judged, with an axis of candidates in front; x and y alone are the leader's.

    Attributes:
        xs, ys: of each.
        vs: of each, zeros where none is kept.
        steps: the step of one local step on y, of each.
        pulls: d_y g at (x, y), of each; zeros before they were asked.
    """

    xs: PyTree
    ys: PyTree
    vs: PyTree
    steps: Each
    pulls: PyTree


@final
class Scoring(Algorithm):
    """The program: it tells `score`, (candidates,), and leaves the state with y trained.

    Args:
        turns: how often y is trained before it is judged; none: it is judged as it is.
        local_steps: in a turn.
    """

    turns: int = eqx.field(static=True, default=0)
    local_steps: int = eqx.field(static=True, default=1)

    def step(self, fed: Federation, state: Candidates) -> tuple[Candidates, dict[str, Each]]:
        def turn(_: Int[Array, ""], now: tuple[PyTree, PyTree, Each]) -> tuple[PyTree, PyTree, Each]:
            ys, pulls, _ = now
            ys = optax.tree.add(ys, fed.average(self.moves, state.xs, ys, pulls, state.steps))
            return ys, *told(ys)

        def told(ys: PyTree) -> tuple[PyTree, Each]:
            loss, pulls = fed.average(self.slopes, state.xs, ys)
            return pulls, loss

        now = state.ys, state.pulls, jnp.zeros_like(state.steps)
        ys, pulls, loss = fed.repeat(self.turns, turn, now) if self.turns else (state.ys, *told(state.ys))
        lag = jax.vmap(lambda v, q: jnp.real(jnp.asarray(optax.tree.vdot(v, q))))(state.vs, pulls)
        score = jnp.maximum(loss, loss - lag.astype(loss.dtype))
        return Candidates(state.x, state.y, state.xs, ys, state.vs, state.steps, pulls), {"score": score}

    def slopes(self, client: Client, xs: PyTree, ys: PyTree) -> tuple[Each, PyTree]:
        """(f_i, d_y g_i) of each candidate."""
        inner, outer, problem = client.inner, client.outer, client.problem

        def one(x: PyTree, y: PyTree) -> tuple[Float[Array, ""], PyTree]:
            return problem.outer_value(x, y, outer), problem.inner_gradient(x, y, inner)

        return jax.vmap(one)(xs, ys)

    def moves(self, client: Client, xs: PyTree, ys: PyTree, pull: PyTree, steps: Each) -> PyTree:
        """How far the client's corrected local steps go, of each candidate."""
        inner, problem = client.inner, client.problem

        def one(x: PyTree, y: PyTree, q: PyTree, step: Float[Array, ""]) -> PyTree:
            along = lambda y: problem.inner_gradient(x, y, inner)
            correction = optax.tree.sub(q, along(y))

            def down(_: Int[Array, ""], z: PyTree) -> PyTree:
                direction = optax.tree.add(along(z), correction)
                return jax.tree.map(lambda a, d: a - step.astype(a.dtype) * d, z, direction)

            return optax.tree.sub(jax.lax.fori_loop(0, self.local_steps, down, y), y)

        return jax.vmap(one)(xs, ys, pull, steps)
