"""Quadratics with heterogeneous clients: every quantity has a closed form. The task for correctness and theory.

    g_i(x, y) = mean over rows (h, b) of  y'H_i y / 2 - y'(B_i x + b)       f_i(x, y) = |y - t|^2 / 2 + |x|^2 / 20

A client's rows carry its H_i and B_i (they differ between clients by `SPREAD`) and a noisy target, so that minibatches
are noisy too. Curvatures of the mean H lie between about 1 and 10.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..arrays import held
from ..keys import generator
from .base import Kind, Options, Row, Task
from .closed_form import Columns, synthetic

UPPER, LOWER = 4, 6
SPREAD = 0.5


def inner_loss(x: Float[Array, " upper"], y: Float[Array, " lower"], row: Row) -> Float[Array, ""]:
    """One row's quadratic in y."""
    return 0.5 * y @ row["H"] @ y - y @ (row["B"] @ x + row["b"])


def outer_loss(x: Float[Array, " upper"], y: Float[Array, " lower"], row: Row) -> Float[Array, ""]:
    """Half the squared distance to the row's target, plus a small penalty on x."""
    return 0.5 * jnp.sum((y - row["t"]) ** 2) + 0.05 * jnp.sum(x**2)


def build(options: Options) -> Task:
    def clients(draw: np.random.Generator, counts: list[int]) -> list[tuple[Columns, Columns]]:
        basis, _ = np.linalg.qr(draw.normal(size=(LOWER, LOWER)))
        common = basis @ np.diag(np.geomspace(1.0, 10.0, LOWER)) @ basis.T
        cross = draw.normal(size=(LOWER, UPPER))
        return [_client(draw, common, cross, rows) for rows in counts]

    start = lambda key: (held(generator(key).normal(size=UPPER)), held(np.zeros(LOWER)))
    return synthetic("quadratic", options, inner_loss, outer_loss, clients, start)


def _client(draw: np.random.Generator, common: np.ndarray, cross: np.ndarray, rows: int) -> tuple[Columns, Columns]:
    root = draw.normal(size=(LOWER, LOWER)) * SPREAD
    hessian = common + root @ root.T
    mixed = cross + SPREAD * draw.normal(size=cross.shape)
    centre = SPREAD * draw.normal(size=LOWER)
    repeat = lambda matrix: np.broadcast_to(matrix, (rows, *matrix.shape))
    noisy = lambda middle: middle + 0.1 * draw.normal(size=(rows, LOWER))
    return {"H": repeat(hessian), "B": repeat(mixed), "b": noisy(centre)}, {"t": noisy(centre + 1)}


quadratic = Kind("quadratic", "random heterogeneous quadratics; everything has a closed form", ("synthetic",), build)
