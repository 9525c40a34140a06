"""What the algorithms with a lower loop share: their settings, the loop's rounds, and the rounds of the upper level."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import optax.tree
from jaxtyping import PyTree

from ..algorithm import Algorithm, Info, State, Truncation, choice, count, option, rate
from ..federation import Client, Federation
from .components.directions import hypergradient, inner_gradient
from .components.steps import descend, fedsvrg, local_descent, norm
from .curvature import AutoStep, keeping, kept_in
from .neumann import NeumannSeries
from .optimizer import begin, outer_step, resolve


def one_cohort(fed: Federation, same: bool) -> Any:
    """The clients of a group of exchanges, as `fed.average(cohort=...)` takes them; None: fresh ones each time, or all."""
    return fed.draw_cohort() if same and fed.cohort_size < fed.clients else None


class Settings(AutoStep):
    """The settings that all algorithms here share, documented at each."""

    follows: ClassVar[dict[str, str]] = AutoStep.follows | {"optimizer": "outer_optimizer", "control": "inner_lr"}

    inner_rounds: int = count(5)
    inner_lr: Any = rate(0.01)
    local_steps: int = count(5)
    hessian_lr: Any = rate(0.01, "auto")
    outer_lr: Any = rate(0.05)
    outer_steps: int = count(1)
    batch_size: int | None = count(None)
    truncation: Any = eqx.field(default="uniform", converter=Truncation)
    skip_idle_rounds: bool = option(False)
    same_cohort: bool = option(False)
    outer_optimizer: Any = choice(None)

    def __check_init__(self):
        resolve(self.outer_optimizer, type(self).__name__)

    def keeps(self, x, y):
        return super().keeps(x, y) | begin(self.outer_optimizer, x)


class LowerLoop(Algorithm):
    """An algorithm whose iteration begins with rounds on the lower variable alone."""

    @abc.abstractmethod
    def lower_rounds(self, fed: Federation, x: PyTree, y: PyTree) -> tuple[PyTree, Any]:
        """(y after the lower level's rounds, |d_y g| as the last of them saw it)."""

    def lower_loop(self, fed: Federation, x: PyTree, y: PyTree) -> PyTree:
        """y after the lower level's rounds."""
        return self.lower_rounds(fed, x, y)[0]


class CorrectedLower(LowerLoop):
    """The lower loop of anchored rounds: mean gradient, then FedSVRG steps from it. Two rounds a turn.

    y* is its fixed point for any number of local steps and any heterogeneity; it converges if
    inner_lr <= 1/max L_i and inner_lr * local_steps * L_g < 2.
    """

    inner_rounds: eqx.AbstractVar[int]
    inner_lr: eqx.AbstractVar[Any]
    local_steps: eqx.AbstractVar[int]
    batch_size: eqx.AbstractVar[int | None]
    skip_idle_rounds: eqx.AbstractVar[bool]
    same_cohort: eqx.AbstractVar[bool]

    def lower(self, client: Client, x: PyTree, y: PyTree, q: PyTree) -> PyTree:
        """FedSVRG steps on y around the mean gradient q at y."""
        rows = client.batches("inner", self.batch_size, self.local_steps - 1, at=x)  # the first step needs none
        return fedsvrg(lambda s: inner_gradient(client.problem, x, rows(s)), y, q, self.inner_lr, self.local_steps)

    def lower_round(self, fed: Federation, x: PyTree, y: PyTree, q: PyTree, cohort: Any = None) -> PyTree:
        """The round that follows the anchor round; with one local step nothing is left for the clients to add."""
        if self.skip_idle_rounds and self.local_steps == 1:
            return descend(y, self.inner_lr, q)
        return fed.average(self.lower, x, y, q, cohort=cohort)

    def gradient(self, client: Client, x: PyTree, y: PyTree) -> PyTree:
        """d_y g_i."""
        return client.problem.inner_gradient(x, y, client.batch("inner", self.batch_size))

    def lower_rounds(self, fed: Federation, x: PyTree, y: PyTree) -> tuple[PyTree, Any]:
        """`inner_rounds` times an anchor round and a round of local steps."""

        def turn(t, loop):
            y, _ = loop
            cohort = one_cohort(fed, self.same_cohort)
            q = fed.average(self.gradient, x, y, cohort=cohort)
            return self.lower_round(fed, x, y, q, cohort), norm(q)

        return fed.repeat(self.inner_rounds, turn, (y, jnp.zeros_like(norm(y))))


class LocalLower(LowerLoop):
    """The lower loop of plain local SGD: one round a turn, and a fixed point off y* for two or more local steps."""

    inner_rounds: eqx.AbstractVar[int]
    inner_lr: eqx.AbstractVar[Any]
    local_steps: eqx.AbstractVar[int]
    batch_size: eqx.AbstractVar[int | None]

    def lower(self, client: Client, x: PyTree, y: PyTree) -> PyTree:
        """Plain gradient steps on y."""
        rows = client.batches("inner", self.batch_size, self.local_steps, at=x)
        return local_descent(lambda s: inner_gradient(client.problem, x, rows(s)), y, self.inner_lr, self.local_steps)

    def lower_rounds(self, fed: Federation, x: PyTree, y: PyTree) -> tuple[PyTree, Any]:
        """`inner_rounds` rounds of local steps."""

        def turn(t, loop):
            before, _ = loop
            after = fed.average(self.lower, x, before)
            return after, norm(optax.tree.sub(after, before)) / (self.inner_lr * self.local_steps)

        return fed.repeat(self.inner_rounds, turn, (y, jnp.zeros_like(norm(y))))


class CorrectedUpper(Settings):
    """The upper level: an estimate of the hypergradient, then with v fixed FedSVRG steps on x around it, in one round."""

    @abc.abstractmethod
    def estimate_parts(self, fed: Federation, state: State) -> tuple[PyTree, PyTree, dict[str, Any], State, Any]:
        """(h, v such that h = d_x f - d2_xy g v, the rest of `Info` by name, the state but for a new x, and the clients
        of the upper round, None for fresh ones)."""

    def step(self, fed: Federation, state: State) -> tuple[State, Info]:
        h, v, told, after, cohort = self.estimate_parts(fed, state)
        mean = self.upper_round(fed, state.x, after.y, v, h, cohort)
        kept = self.watch(kept_in(after), norm(v))
        x, kept = outer_step(self.outer_optimizer, state.x, mean, kept)
        return keeping(x, after.y, kept), Info(norm(h), **told)

    def estimate(self, fed: Federation, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        h, _, _, after, _ = self.estimate_parts(fed, self.init(x, y))
        return h, after.y

    def hypergradient(self, client: Client, x: PyTree, y: PyTree, v: PyTree) -> PyTree:
        """h_i(x) = d_x f_i - d2_xy g_i v."""
        return hypergradient(client.problem, x, y, v, *self._rows(client, 0))

    def upper(self, client: Client, x: PyTree, y: PyTree, v: PyTree, h: PyTree) -> PyTree:
        """FedSVRG steps on x around the mean hypergradient h at x, with y and v fixed."""

        def along(s):
            rows = self._rows(client, s)
            return lambda z: hypergradient(client.problem, z, y, v, *rows)

        return fedsvrg(along, x, h, self.outer_lr, self.outer_steps)

    def _rows(self, client, draw):
        return tuple(client.batch(level, self.batch_size, draw) for level in ("inner", "outer"))

    def upper_round(self, fed: Federation, x: PyTree, y: PyTree, v: PyTree, h: PyTree, cohort: Any) -> PyTree:
        """The iteration's last round; with one step nothing is left for the clients to add."""
        if self.skip_idle_rounds and self.outer_steps == 1:
            return descend(x, self.outer_lr, h)
        return fed.average(self.upper, x, y, v, h, cohort=cohort)


class NeumannFields(Settings, LowerLoop, NeumannSeries):
    """The settings of FedNest and its variants, documented at `FedNest`."""

    neumann_terms: int = count(5)
