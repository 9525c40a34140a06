"""A saddle point as a bilevel problem: the lower level maximises what the upper level minimises, g = -f.

    f_i(x, y) = mean over rows (A, b) of  -|y|^2 / 2 - b'y + y'A x  + CURVATURE |x|^2 / 2

After the minimax task of FedNest's public code. With A and b averaged over clients: y*(x) = A x - b,
Phi(x) = |A x - b|^2 / 2 + CURVATURE |x|^2 / 2, and the saddle point is x = (A'A + CURVATURE I)^{-1} A'b. At y*(x) the
hypergradient has no implicit part, for d_y f = -d_y g = 0 there.
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

UPPER, LOWER = 5, 5
CURVATURE = 0.1
SPREAD = 0.5


def outer_loss(x: Float[Array, " upper"], y: Float[Array, " lower"], row: Row) -> Float[Array, ""]:
    """f of one row."""
    return -0.5 * jnp.sum(y**2) - row["b"] @ y + y @ row["A"] @ x + 0.5 * CURVATURE * jnp.sum(x**2)


def inner_loss(x: Float[Array, " upper"], y: Float[Array, " lower"], row: Row) -> Float[Array, ""]:
    """-f of one row."""
    return -outer_loss(x, y, row)


def build(options: Options) -> Task:
    def clients(draw: np.random.Generator, counts: list[int]) -> Iterator[tuple[Columns, Columns]]:
        common, wish = np.eye(UPPER) + 0.3 * draw.normal(size=(LOWER, UPPER)), draw.normal(size=LOWER)
        for rows in counts:
            A = common + SPREAD * draw.normal(size=(LOWER, UPPER))
            b = wish + SPREAD * draw.normal(size=LOWER)
            noisy = {"A": A + 0.1 * draw.normal(size=(rows, *A.shape)), "b": b + 0.1 * draw.normal(size=(rows, LOWER))}
            yield noisy, noisy  # both levels judge the same rows

    start = lambda key: (held(generator(key).normal(size=UPPER)), held(np.zeros(LOWER)))
    return synthetic("minimax", options, inner_loss, outer_loss, clients, start)


minimax = Kind("minimax", "a saddle point, g = -f; everything has a closed form", ("synthetic",), build)
