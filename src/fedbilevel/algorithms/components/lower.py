"""The lower loop: `inner_rounds` turns on y alone, with x fixed."""

from __future__ import annotations

import abc
from typing import final

import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Float, Int, PyTree

from ...algorithm import Component, count, option, rate
from ...federation import Client, Federation
from ...pace.curvature import Rate, number
from .directions import inner_gradient
from .steps import descend, fedsvrg, local_descent, norm
from .upper import one_cohort

Loop = tuple[PyTree, Float[Array, ""]]  # y, |d_y g|
Turn = int | Int[Array, ""]


class LowerLoop(Component):
    """Rounds on the lower variable. Abstract.

    Args:
        inner_rounds: the turns.
        inner_lr: the step of ONE local step.
        local_steps: local steps a turn.
        batch_size: rows of a minibatch, fresh for every step; None for all rows.
    """

    inner_rounds: int = count(5)
    inner_lr: Rate | str = rate(0.01, "auto")
    local_steps: int = count(5)
    batch_size: int | None = count(None)

    @abc.abstractmethod
    def rounds(self, fed: Federation, x: PyTree, y: PyTree) -> Loop:
        """(y after the turns, |d_y g| as the last of them saw it)."""


@final
class CorrectedLower(LowerLoop):
    """Anchored turns of two rounds: the mean gradient, then FedSVRG steps around it.

    y* is its fixed point for any number of local steps and any heterogeneity; it converges if
    inner_lr <= 1/max L_i and inner_lr * local_steps * L_g < 2.

    Args:
        skip_idle_rounds: leave the second round out where one step adds nothing.
        same_cohort: one cohort for both rounds of a turn, instead of a fresh one for each.
    """

    skip_idle_rounds: bool = option(False)
    same_cohort: bool = option(False)

    def rounds(self, fed: Federation, x: PyTree, y: PyTree) -> Loop:
        def turn(t: Turn, loop: Loop) -> Loop:
            y, _ = loop
            cohort = one_cohort(fed, self.same_cohort)
            q = fed.average(self.gradient, x, y, cohort=cohort)
            if self.skip_idle_rounds and self.local_steps == 1:  # nothing is left for the clients to add
                return descend(y, number(self.inner_lr), q), norm(q)
            return fed.renewed(fed.average(self.steps, x, y, q, cohort=cohort), y), norm(q)

        return fed.repeat(self.inner_rounds, turn, (y, jnp.zeros_like(norm(y))))

    # The clients' side ----------------------------------------------------------------------------------------------

    def gradient(self, client: Client, x: PyTree, y: PyTree) -> PyTree:
        """q_i = d_y g_i."""
        return client.problem.inner_gradient(x, y, client.batch("inner", self.batch_size))

    def steps(self, client: Client, x: PyTree, y: PyTree, q: PyTree) -> PyTree:
        """FedSVRG steps on y around the mean gradient q at y."""
        rows = client.batches("inner", self.batch_size, self.local_steps - 1, at=x)  # the first step needs none
        return fedsvrg(
            lambda s: inner_gradient(client.problem, x, rows(s)), y, q, number(self.inner_lr), self.local_steps
        )


@final
class LocalLower(LowerLoop):
    """Plain local SGD: one round a turn, and a fixed point off y* for two or more local steps."""

    def rounds(self, fed: Federation, x: PyTree, y: PyTree) -> Loop:
        def turn(t: Turn, loop: Loop) -> Loop:
            before, _ = loop
            after = fed.renewed(fed.average(self.steps, x, before), before)
            return after, norm(optax.tree.sub(after, before)) / (number(self.inner_lr) * self.local_steps)

        return fed.repeat(self.inner_rounds, turn, (y, jnp.zeros_like(norm(y))))

    # The client's side ----------------------------------------------------------------------------------------------

    def steps(self, client: Client, x: PyTree, y: PyTree) -> PyTree:
        """Plain gradient steps on y."""
        rows = client.batches("inner", self.batch_size, self.local_steps, at=x)
        return local_descent(
            lambda s: inner_gradient(client.problem, x, rows(s)), y, number(self.inner_lr), self.local_steps
        )
