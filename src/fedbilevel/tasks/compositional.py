"""A composition as a bilevel problem: min_x f(x, r(x)) with r the mean of the clients' r_i, which none of them knows.

    g_i(x, y) = |y - r_i(x)|^2 / 2,  r_i(x) = mean over rows (R, s) of R x + s        so that y*(x) = mean_i r_i(x)
    f_i(x, y) = mean over rows t of |y - t|^2 / 2  +  CURVATURE |x|^2 / 2

The Hessian of g is the identity, v* = d_y f = y* - t, and grad Phi(x) = R'(R x + s - t) + CURVATURE x with means over
clients.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..arrays import held
from ..keys import generator
from .base import Kind, Options, Row, Task
from .closed_form import Columns, synthetic

UPPER, LOWER = 4, 6
CURVATURE = 0.1
SPREAD = 0.5


def inner_loss(x: Float[Array, " upper"], y: Float[Array, " lower"], row: Row) -> Float[Array, ""]:
    """Half the squared distance of y to one row's r(x)."""
    return 0.5 * jnp.sum((y - row["R"] @ x - row["s"]) ** 2)


def outer_loss(x: Float[Array, " upper"], y: Float[Array, " lower"], row: Row) -> Float[Array, ""]:
    """Half the squared distance of y to the row's target, plus a small penalty on x."""
    return 0.5 * jnp.sum((y - row["t"]) ** 2) + 0.5 * CURVATURE * jnp.sum(x**2)


def build(options: Options) -> Task:
    def clients(draw: np.random.Generator, counts: list[int]) -> Iterator[tuple[Columns, Columns]]:
        common, wish = draw.normal(size=(LOWER, UPPER)) / 2, draw.normal(size=LOWER)
        for rows in counts:
            R, shift = common + SPREAD * draw.normal(size=common.shape), SPREAD * draw.normal(size=LOWER)
            noisy = lambda middle, rows=rows: middle + 0.1 * draw.normal(size=(rows, *middle.shape))
            yield {"R": noisy(R), "s": noisy(shift)}, {"t": noisy(wish + SPREAD * draw.normal(size=LOWER))}

    start = lambda key: (held(generator(key).normal(size=UPPER)), held(np.zeros(LOWER)))
    return synthetic("compositional", options, inner_loss, outer_loss, clients, start)


compositional = Kind(
    "compositional", "f(x, r(x)) with r known to nobody; everything has a closed form", ("synthetic",), build
)
