"""The upper level's rounds, with v fixed: the mean hypergradient h, then FedSVRG steps on x around it."""

from __future__ import annotations

import jax
from jaxtyping import Array, Int, PyTree

from ...algorithm import Component, count, option, rate
from ...federation import Client, Federation
from ...pace.curvature import Rate, number
from ...problem import Rows
from .directions import hypergradient
from .steps import descend, fedsvrg


def one_cohort(fed: Federation, same: bool) -> Int[Array, " n"] | None:
    """The clients of a group of exchanges, as `fed.average(cohort=...)` takes them; None: fresh ones each time, or all."""
    return fed.draw_cohort() if same and fed.cohort_size < fed.clients else None


class CorrectedUpper(Component):
    """The upper level, once there is v: two rounds.

    Args:
        outer_lr: the step of ONE local upper step.
        outer_steps: local upper steps.
        batch_size: rows of a minibatch; None for all rows.
        skip_idle_rounds: leave the second round out where one step adds nothing.
    """

    outer_lr: Rate | str = rate(0.05, "auto")
    outer_steps: int = count(1)
    batch_size: int | None = count(None)
    skip_idle_rounds: bool = option(False)

    def estimate(self, fed: Federation, x: PyTree, y: PyTree, v: PyTree, cohort: jax.Array | None) -> PyTree:
        """The round that makes h = mean h_i, like x."""
        return fed.average(self.hypergradient, x, y, v, cohort=cohort)

    def move(self, fed: Federation, x: PyTree, y: PyTree, v: PyTree, h: PyTree, cohort: jax.Array | None) -> PyTree:
        """The mean of the clients' x_i, in a round; with one step nothing is left for the clients to add."""
        if self.skip_idle_rounds and self.outer_steps == 1:
            return descend(x, number(self.outer_lr), h)
        return fed.renewed(fed.average(self.steps, x, y, v, h, cohort=cohort), x)

    # The clients' side ----------------------------------------------------------------------------------------------

    def hypergradient(self, client: Client, x: PyTree, y: PyTree, v: PyTree) -> PyTree:
        """h_i(x) = d_x f_i - d2_xy g_i v."""
        return hypergradient(client.problem, x, y, v, *self._rows(client, 0))

    def steps(self, client: Client, x: PyTree, y: PyTree, v: PyTree, h: PyTree) -> PyTree:
        """FedSVRG steps on x around the mean hypergradient h at x, with y and v fixed."""

        def along(s):
            rows = self._rows(client, s)
            return lambda z: hypergradient(client.problem, z, y, v, *rows)

        return fedsvrg(along, x, h, number(self.outer_lr), self.outer_steps)

    def _rows(self, client: Client, draw: int | jax.Array) -> tuple[Rows, Rows]:
        return client.batch("inner", self.batch_size, draw), client.batch("outer", self.batch_size, draw)
