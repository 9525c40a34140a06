"""Training: y alone over the federation, at an x that stays where it is: what `fb.train` runs.

The part of y of `Lockstep`. Client i keeps c_i, the server c = mean c_i over ALL clients, both zero
at first. One iteration:

    ask     inner_lr="auto": now and then the largest curvature of any client (`inner_step`)
    moves   a_i = d_y g_i(x, y);  y_i = y, `local_steps` times  y_i -= inner_lr [d_y g_i(x, y_i) - c_i + c]
            up y_i - y and a_i - c_i;  c_i <- a_i
    server  y += mean (y_i - y),   c += sum of p_i (a_i - c_i) over those who answered

With inner_lr="auto" one number more goes up, the steepest curvature along the clients' paths; where
it is beyond what was reckoned with, y stays for this round.

At y*(x), with c_i = d_y g_i and c = 0, nothing moves, whatever the clients, the local steps and the
cohorts: no floor but that of minibatches. It is SCAFFOLD (Karimireddy et al., ICML 2020), with a step
that is found. Floats per client and round: x and 2 dy down, 2 dy up.
"""

from __future__ import annotations

from typing import ClassVar, final

import jax
import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Float, PyTree

from .. import algorithm, owned
from ..algorithm import Algorithm, component, count, rate
from ..errors import check
from ..federation import Client, Federation, Reply
from ..pace.curvature import AutoStep, Curvature, Rate
from .components.directions import inner_gradient
from .components.inner_step import ask, judged, share_of_curvature, watched_descent
from .components.steps import Gradient, controlled_descent, drift, moved_mean, norm


class State(algorithm.State):
    """x, which stays, y, and the control variates' mean.

    Attributes:
        control: c, like y.
        curvature: what `inner_lr="auto"` remembers.
    """

    control: PyTree
    curvature: Curvature | None


@final
class Training(Algorithm):
    """The lower level alone, at a fixed x: corrected local steps, one round an iteration.

    Diagnostics: `lower_gradient_norm`, |d_y g|, and `inner_lr`, the step that was taken; zero where
    it would have been too long, and y stayed.

    Args:
        inner_lr: the step of ONE local step; "auto" finds it.
        local_steps: local steps a round.
        batch_size: rows of a minibatch, fresh for every local step; None for all rows.
        measuring: rounds of the first measurement, at most; None for as many as it takes to ask
            everybody (20 at most).
    """

    paced: ClassVar[bool] = False
    follows: ClassVar[dict[str, str]] = {"y": "inner_lr", "control": "inner_lr"}

    inner_lr: Rate | str = rate("auto", "auto")
    local_steps: int = count(5)
    batch_size: int | None = count(None)
    measuring: int | None = count(None)

    @component
    def pace(self) -> AutoStep:
        """The step of y: of single clients' curvature, since local steps act alone."""
        return AutoStep(self.inner_lr, self.batch_size, local_factors=True)

    def init(self, x: PyTree, y: PyTree) -> State:
        return State(x, y, optax.tree.zeros_like(y), self.pace.begin(y))

    def client_init(self, x: PyTree, y: PyTree) -> PyTree:
        return optax.tree.zeros_like(y)

    def step(self, fed: Federation, state: State) -> tuple[State, dict[str, Float[Array, ""]]]:
        everyone = fed.cohort_size == fed.clients
        check(everyone or not fed.weighted, "Training with weighted clients needs all of them: leave cohort= out.")
        if state.curvature is not None:
            return self._measured(fed, state, state.curvature)
        moved, change = fed.average(self.moves, state.x, state.y, state.control)
        after, direction = self._after(fed, state, moved, change)
        lr = jnp.asarray(self.inner_lr, norm(direction).dtype)
        return after, {"lower_gradient_norm": norm(direction), "inner_lr": lr}

    def _measured(self, fed: Federation, state: State, memory: Curvature) -> tuple[State, dict[str, Float[Array, ""]]]:
        """`step` with a step that is found."""
        longest, memory = ask(self.pace, fed, state.x, state.y, memory, self.measuring)
        share = share_of_curvature(self.local_steps, fed.clients, fed.cohort_size)
        lam = longest * jnp.asarray(share, longest.dtype)
        ways = ("mean", "mean", "maximum")
        message = state.x, state.y, state.control, lam
        moved, change, steepest = fed.average(self.watched_moves, *message, combine=ways)
        safe, memory = judged(memory, steepest, optax.tree.add(state.control, change))
        moved = jax.tree.map(lambda leaf: jnp.where(safe, leaf, jnp.zeros_like(leaf)), moved)
        after, direction = self._after(fed, state, moved, change, memory)
        lr = jnp.where(safe, lam, jnp.zeros_like(lam))
        return after, {"lower_gradient_norm": norm(direction), "inner_lr": lr}

    def _after(
        self,
        fed: Federation,
        state: State,
        moved: PyTree,
        change: PyTree,
        memory: Curvature | None = None,
    ) -> tuple[State, PyTree]:
        """(The next state, an estimate of d_y g at the old y)."""
        control = moved_mean(state.control, fed.share, change)
        after = State(state.x, optax.tree.add(state.y, moved), control, memory)
        return after, optax.tree.add(state.control, change)

    def moves(self, client: Client, x: PyTree, y: PyTree, c: PyTree) -> Reply:
        """How far the client's steps go from y, and a_i - c_i; it keeps a_i = d_y g_i(x, y)."""
        along, a, correction = self._begun(client, x, y, c)
        assert not isinstance(self.inner_lr, str)  # where it is found, it travels
        end = controlled_descent(along, y, a, correction, self.inner_lr, self.local_steps)
        return Reply((optax.tree.sub(end, y), optax.tree.sub(a, client.state)), owned.with_zeros(a))

    def watched_moves(self, client: Client, x: PyTree, y: PyTree, c: PyTree, lam: Float[Array, ""]) -> Reply:
        """`moves` with a step that travels; and the steepest curvature along the client's path."""
        along, a, correction = self._begun(client, x, y, c)
        steps, same = self.local_steps, self.batch_size is None
        end, steepest = watched_descent(along, y, a, correction, lam, steps, same)
        return Reply((optax.tree.sub(end, y), optax.tree.sub(a, client.state), steepest), owned.with_zeros(a))

    def _begun(self, client: Client, x: PyTree, y: PyTree, c: PyTree) -> tuple[Gradient, PyTree, PyTree]:
        """(The client's gradients by draw, a_i, what corrects its steps)."""
        rows = client.batches("inner", self.batch_size, self.local_steps, at=x)
        along = lambda s: inner_gradient(client.problem, x, rows(s))
        return along, along(0)(y), drift(c, client.state)
