"""The search for y*: L-BFGS comes near, damped Newton steps finish."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from .linear import Count, Flat, Matrix, Product, Scalar, norm, rounding

_Steps = tuple[Flat, Flat, Scalar, Count, Bool[Array, ""], Bool[Array, ""]]


@runtime_checkable
class Level(Protocol):
    """What the search asks of the lower level: a `lower.Lower`."""

    def gradient(self, y: Flat) -> Flat: ...

    def value_and_gradient(self, y: Flat) -> tuple[Scalar, Flat]: ...

    def curvature(self, y: Flat, form: bool) -> tuple[Matrix | None, Product]: ...

    def solver(self, y: Flat, matrix: Matrix | None, accuracy: float) -> Product: ...


def newton(lower: Level, y: Flat) -> tuple[Flat, Flat, Bool[Array, ""]]:
    """(The end of damped Newton steps from y, d_y g there, whether that is y*)."""

    def step(state: _Steps) -> _Steps:
        y, gradient, damping, k, *_ = state
        matrix, _ = lower.curvature(y, form=False)
        move = lower.solver(y, matrix, accuracy=rounding(y.dtype, 0.5))(gradient)
        trial = y - damping * move
        trial_gradient = lower.gradient(trial)
        old, new = norm(gradient), norm(trial_gradient)
        reached = norm(move) <= rounding(y.dtype, 0.4) * (1 + norm(y))  # Newton's method squares this at each step
        done = reached & ~(new < old / 2)  # and when it no longer does, rounding errors are all that is left
        y, gradient = jnp.where(new < old, trial, y), jnp.where(new < old, trial_gradient, gradient)
        damping = jnp.where(new < old, jnp.minimum(4 * damping, 1), damping / 4)
        return y, gradient, damping, k + 1, reached, done

    def unfinished(state: _Steps) -> Bool[Array, ""]:
        _, _, damping, k, _, done = state
        return ~done & (damping > 1e-4) & (k < 100)

    no = jnp.zeros((), bool)
    start = y, lower.gradient(y), jnp.ones((), y.dtype), jnp.zeros((), jnp.int32), no, no
    y, gradient, _, _, reached, _ = jax.lax.while_loop(unfinished, step, start)
    return y, gradient, reached


def descend(lower: Level, y: Flat) -> Flat:
    """Near y* by L-BFGS, which is safe far from it; the start itself if g turns out to have no bottom."""
    import optimistix as optx  # slow to import, and for this alone

    wide = jnp.result_type(float)  # optimistix holds its step sizes in this dtype, whatever that of y

    def value_and_gradient(z: Flat) -> tuple[Scalar, Flat]:
        value, gradient = lower.value_and_gradient(z.astype(y.dtype))
        return value.astype(wide), gradient.astype(wide)

    @jax.custom_jvp
    def value(z: Flat) -> Scalar:
        return value_and_gradient(z)[0]

    @value.defjvp
    def _(z: Sequence[Flat], tangent: Sequence[Flat]) -> tuple[Scalar, Scalar]:
        value, gradient = value_and_gradient(*z)
        return value, jnp.sum(gradient * tangent[0])

    solver = optx.LBFGS(rtol=rounding(y.dtype, 0.5), atol=rounding(y.dtype, 0.5))
    end = optx.minimise(lambda z, _: value(z), solver, y.astype(wide), max_steps=2_000, throw=False).value
    return jnp.where(jnp.all(jnp.isfinite(end)), end.astype(y.dtype), y)
