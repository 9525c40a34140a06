"""Training: y alone over the federation, at an x that stays where it is: what `fb.train` runs.

The part of y of `Lockstep`. Client i keeps c_i, the server c = mean c_i over ALL clients, both zero at first. One iteration:

    ask     inner_lr="auto": now and then the largest curvature of any client (`components.inner_step`)
    moves   a_i = d_y g_i(x, y);   y_i = y, `local_steps` times   y_i -= inner_lr [d_y g_i(x, y_i) - c_i + c]
            up y_i - y and a_i - c_i;  c_i <- a_i
    server  y += mean (y_i - y),   c += sum of p_i (a_i - c_i) over those who answered

At y*(x), with c_i = d_y g_i and c = 0, nothing moves, whatever the clients, the local steps and the cohorts: no floor but
that of minibatches. It is SCAFFOLD (Karimireddy et al., ICML 2020), with a step that is found. Floats per client and round:
x and 2 dy down, 2 dy up.
"""

from __future__ import annotations

from typing import ClassVar, final

import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Float, PyTree

from .. import algorithm
from ..algorithm import Algorithm, component, count, rate
from ..errors import check
from ..federation import Client, Federation, Reply
from .components.curvature import AutoStep, Curvature, Rate
from .components.directions import inner_gradient
from .components.inner_step import ask, noted, share_of_curvature
from .components.steps import controlled_descent, moved_mean, norm


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

    Diagnostics: `lower_gradient_norm`, |d_y g|, and `inner_lr`, the step that was taken.

    Args:
        inner_lr: the step of ONE local step; "auto" finds it.
        local_steps: local steps a round.
        batch_size: rows of a minibatch, fresh for every local step; None for all rows.
        measuring: rounds of the first measurement, at most; None for as many as it takes to ask everybody (20 at most).
    """

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
        x, y, c, memory, lam = state.x, state.y, state.control, state.curvature, None
        if memory is not None:
            longest, memory = ask(self.pace, fed, x, y, memory, self.measuring)
            share = share_of_curvature(self.local_steps, fed.clients, fed.cohort_size)
            lam = longest * jnp.asarray(share, longest.dtype)
        moved, change = fed.average(self.moves, x, y, c, lam)
        direction = optax.tree.add(c, change)  # an estimate of d_y g at the old point
        told = {"lower_gradient_norm": norm(direction), "inner_lr": jnp.asarray(self.pace.lam(lam), norm(y).dtype)}
        control = moved_mean(c, fed.share, change)
        return State(x, optax.tree.add(y, moved), control, noted(memory, direction)), told

    def moves(self, client: Client, x: PyTree, y: PyTree, c: PyTree, lam: Float[Array, ""] | None) -> Reply:
        """How far the client's steps go from y, and a_i - c_i; it keeps a_i = d_y g_i(x, y)."""
        rows = client.batches("inner", self.batch_size, self.local_steps, at=x)
        along = lambda s: inner_gradient(client.problem, x, rows(s))
        a, correction = along(0)(y), optax.tree.sub(c, client.state)
        end = controlled_descent(along, y, a, correction, self.pace.lam(lam), self.local_steps)
        return Reply((optax.tree.sub(end, y), optax.tree.sub(a, client.state)), a)
