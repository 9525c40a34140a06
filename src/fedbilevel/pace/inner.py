"""How long local steps on y may be, of the largest curvature of a client; and how everybody is asked for it.

Where the number comes from stands in `algorithms.components.inner_step`.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int

from ..federation import Federation

MOST = 20  # rounds of the first measurement, at most
_DAMPED = 0.5  # of N - M
_ALONE = 3.0  # T b = 1/3 where one client is asked at a time


def rounds_of_first(clients: int, cohort: int) -> int:
    """In how many rounds everybody is asked, up to `MOST`."""
    return min(MOST, -(-clients // cohort))


def share_of_curvature(local_steps: int, clients: int, cohort: int) -> float:
    """b: the step in units of 1/L."""
    low, high = 0.0, 1.0
    if _overshoot(high, local_steps) > _DAMPED:
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if _overshoot(middle, local_steps) <= _DAMPED else (low, middle)
        high = low
    left_out = (clients - cohort) / (cohort * max(clients - 1, 1))
    return high / (1 + left_out * (_ALONE * local_steps * high - 1))


def _overshoot(b: float, steps: int) -> float:
    """The largest N - M."""
    return b * (steps - (1 - (1 - b) ** steps) / b) / 4


def everybody_in_turn(fed: Federation, turn: Int[Array, ""], turns: int) -> Int[Array, " cohort"]:
    """The clients of a turn: one after the other, or spread evenly where so many turns do not reach all."""
    asked = turns * fed.cohort_size
    place = (turn % turns) * fed.cohort_size + jnp.arange(fed.cohort_size, dtype=jnp.int32)
    index = place % fed.clients if asked >= fed.clients else place * fed.clients // asked
    return jnp.sort(index).astype(jnp.int32)
