"""What the algorithms share: local steps, the Neumann recursion, and the lower loops of rounds.

Functions here are pure mathematics on pytrees; the abstract modules add the client methods that call them.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Float, PyTree

from ..algorithm import Algorithm, Info, State, Truncation, count, option, rate
from ..federation import Client, Federation
from ..problem import Problem, Rows
from .curvature import AutoStep, keeping, kept_in

Gradient = Callable[[Any], Callable[[PyTree], PyTree]]  # draw number -> (point -> gradient there, on that draw's rows)


def norm(tree: PyTree) -> Float[Array, ""]:
    """Euclidean norm of a pytree."""
    return optax.tree.norm(tree)


def descend(point: PyTree, lr: Any, gradient: PyTree) -> PyTree:
    """point - lr gradient."""
    return optax.tree.add_scale(point, -lr, gradient)


def local_descent(gradient: Gradient, start: PyTree, lr: Any, steps: int) -> PyTree:
    """`steps` plain steps z <- z - lr gradient(z; fresh rows)."""
    return jax.lax.fori_loop(0, steps, lambda s, z: descend(z, lr, gradient(s)(z)), start)


def fedsvrg(gradient: Gradient, anchor: PyTree, mean_gradient: PyTree, lr: Any, steps: int) -> PyTree:
    """`steps` corrected steps z <- z - lr [gradient(z; rows) - gradient(anchor; same rows) + mean_gradient].

    The correction removes the clients' drift: the fixed point is the global one for any number of steps. At the
    first step z is the anchor and the two local gradients cancel, so it is taken without evaluating them.
    """

    def corrected(s, z):
        on_rows = gradient(s)
        drift = optax.tree.sub(on_rows(z), on_rows(anchor))
        return descend(z, lr, optax.tree.add(drift, mean_gradient))

    return jax.lax.fori_loop(1, steps, corrected, descend(anchor, lr, mean_gradient))


def controlled_descent(
    gradient: Gradient, start: PyTree, first: PyTree, correction: PyTree, lr: Any, steps: int
) -> PyTree:
    """`steps` steps z <- z - lr [gradient(z; fresh rows) + correction]; `first` is gradient(0)(start), known already."""
    step = lambda s, z: descend(z, lr, optax.tree.add(gradient(s)(z), correction))
    return jax.lax.fori_loop(1, steps, step, descend(start, lr, optax.tree.add(first, correction)))


def inner_gradient(problem: Problem, x: PyTree, rows: Rows) -> Callable[[PyTree], PyTree]:
    """y -> d_y g(x, y) on the rows."""
    return lambda y: problem.inner_gradient(x, y, rows)


def hessian_factor(problem: Problem, x: PyTree, y: PyTree, v: PyTree, lr: Any, rows: Rows) -> PyTree:
    """(I - lr d2_yy g) v."""
    return descend(v, lr, problem.hessian_vector(x, y, v, rows))


def hypergradient(problem: Problem, x: PyTree, y: PyTree, v: PyTree, inner: Rows, outer: Rows) -> PyTree:
    """d_x f - d2_xy g v, like x: the hypergradient, once v is (an estimate of) H^{-1} d_y f."""
    direct, _ = problem.outer_gradients(x, y, outer)
    return optax.tree.sub(direct, problem.cross_vector(x, y, v, inner))


def moved_mean(mean: PyTree, share: Any, change: PyTree) -> PyTree:
    """The mean over all clients of what each keeps, when a share of them changed it by `change` on average."""
    return jax.tree.map(lambda c, d: c + jnp.asarray(share, d.dtype) * d, mean, change)


def one_cohort(fed: Federation, same: bool) -> Any:
    """The clients of a group of exchanges, as `fed.average(cohort=...)` takes them; None: fresh ones each time, or all."""
    return fed.draw_cohort() if same and fed.cohort_size < fed.clients else None


class Settings(AutoStep):
    """The settings that all algorithms here share, documented at each."""

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


class LowerLoop(Algorithm):
    """An algorithm whose iteration begins with rounds on the lower variable alone."""

    @abc.abstractmethod
    def lower_loop(self, fed: Federation, x: PyTree, y: PyTree) -> PyTree:
        """y after the lower level's rounds."""


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

    def lower_loop(self, fed: Federation, x: PyTree, y: PyTree) -> PyTree:
        """`inner_rounds` times an anchor round and a round of local steps."""

        def turn(t, y):
            cohort = one_cohort(fed, self.same_cohort)
            q = fed.average(self.gradient, x, y, cohort=cohort)
            return self.lower_round(fed, x, y, q, cohort)

        return fed.repeat(self.inner_rounds, turn, y)


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

    def lower_loop(self, fed: Federation, x: PyTree, y: PyTree) -> PyTree:
        """`inner_rounds` rounds of local steps."""
        return fed.repeat(self.inner_rounds, lambda t, y: fed.average(self.lower, x, y), y)


class CorrectedUpper(Algorithm):
    """The upper level: an estimate of the hypergradient, then with v fixed FedSVRG steps on x around it, in one round."""

    outer_lr: eqx.AbstractVar[Any]
    outer_steps: eqx.AbstractVar[int]
    batch_size: eqx.AbstractVar[int | None]
    skip_idle_rounds: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def estimate_parts(self, fed: Federation, state: State) -> tuple[PyTree, PyTree, Any, State, Any]:
        """(h, v such that h = d_x f - d2_xy g v, how much the Hessian factors stretched, the state but for a new x,
        and the clients of the upper round, None for fresh ones)."""

    def step(self, fed: Federation, state: State) -> tuple[State, Info]:
        h, v, stretched, after, cohort = self.estimate_parts(fed, state)
        x = self.upper_round(fed, state.x, after.y, v, h, cohort)
        return keeping(x, after.y, kept_in(after)), Info(norm(h), stretched)

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


class NeumannFields(Settings, LowerLoop):
    """The settings of FedNest and its variants, documented at `FedNest`."""

    neumann_terms: int = count(5)

    def __check_init__(self):
        self.truncation.check_range(type(self).__name__, self.neumann_terms - 1)

    def cut(self, series: PyTree, last: PyTree, lam: Any) -> PyTree:
        """v from the sum of the terms ("full") or from the last one, scaled so that its mean is the sum."""
        full = self.truncation.full
        return optax.tree.scale(lam if full else lam * self.neumann_terms, series if full else last)


def growth(last: Float[Array, ""], first: Float[Array, ""]) -> Float[Array, ""]:
    """last / first, zero where first is."""
    return jnp.where(first > 0, last / jnp.where(first > 0, first, 1), jnp.zeros_like(last))
