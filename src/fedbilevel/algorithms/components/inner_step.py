"""`inner_lr="auto"`: the step of corrected local steps on y, from the largest curvature of a client.

Ours, not a paper's. Local steps act alone, so single clients' curvature counts: L is the largest of
all eigenvalues of the H_i. T steps of length b/L at client i move y, along an eigenvector of H_i of
eigenvalue h L/b, by S(h) times their first step, S(h) = (1 - (1-h)^T) / h with h in [0, b]; and its
control variate is a round old. Where all H_i have the same eigenvectors, the error of y along one is

    e_{k+1} = (1 - M) e_k + (M - N) e_{k-1},     M = mean h S(h),   N = (mean h) (mean S(h))
    0 <= N - M <= b (T - S(b)) / 4               (the inequality of Gruess)

and dies away while N - M < 1. The largest b <= 1 that keeps that bound at 1/2 is 1 for T <= 3, .6
for T = 5, and about 3/T beyond: T steps go three times as far as one, however much clients differ.
A cohort of s of m clients leaves the others' control variates older still: b is divided by
1 + 5 (m - s) / (s (m - 1)). The step is b / (1.2 L).

L is measured by five Lanczos steps of each client on one batch, one number up: at the start in as
many rounds as it takes to ask everybody, cohort by cohort (20 at most, then clients spread evenly
over all), and in one round in iterations 1, 2, 4, 8, ..., and whenever |d_y g| is four times as long
as at the last measurement. Where a run that blows up goes on is said in `curvature`.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ...federation import Federation
from .curvature import GROWN, AutoStep, Curvature
from .steps import norm

MOST = 20  # rounds of the first measurement, at most
_FORGET = 0.9  # how much of an earlier, larger curvature is kept where clients or rows are sampled
_DAMPED = 0.5  # of N - M
_OTHERS = 5.0  # how much shorter steps are where one client is asked


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
    return high / (1 + _OTHERS * left_out)


def _overshoot(b: float, steps: int) -> float:
    """The largest N - M."""
    return b * (steps - (1 - (1 - b) ** steps) / b) / 4


def ask(
    auto: AutoStep, fed: Federation, x: PyTree, y: PyTree, before: Curvature, most: int | None
) -> tuple[Float[Array, ""], Curvature]:
    """(1 / (1.2 L), what is remembered), measured if it is time.

    Args:
        most: rounds of the first measurement, at most; None for no other bound than `MOST`.
    """
    k = before.iteration
    first = rounds_of_first(fed.clients, fed.cohort_size)
    first = first if most is None else min(first, most)
    due = (k & (k - 1) == 0) | before.longer(GROWN) | (before.again > 0)
    times = jnp.where(k == 0, first, jnp.where(due, 1, 0))
    everything = fed.cohort_size == fed.clients and auto.batch_size is None

    def turn(t: Int[Array, ""], seen: Float[Array, ""]) -> Float[Array, ""]:
        cohort = None if fed.cohort_size == fed.clients else _cohort(fed, t + before.iteration, first)
        return jnp.maximum(seen, fed.maximum(auto.largest_curvature, x, y, cohort=cohort))

    kept = jnp.zeros_like(before.largest) if everything else _FORGET * before.largest
    now = auto.renewed(before, due, fed.repeat(times, turn, kept, most=first))
    return now.step, now


def _cohort(fed: Federation, turn: Int[Array, ""], turns: int) -> Int[Array, " cohort"]:
    """The clients of a turn: one after the other, or spread evenly where so many turns do not reach all."""
    asked = turns * fed.cohort_size
    place = (turn % turns) * fed.cohort_size + jnp.arange(fed.cohort_size, dtype=jnp.int32)
    index = place % fed.clients if asked >= fed.clients else place * fed.clients // asked
    return jnp.sort(index).astype(jnp.int32)


def noted(memory: Curvature | None, gradient: PyTree) -> Curvature | None:
    """What is remembered after an iteration, of how long d_y g was.

    No alarm is raised: d_y g may well grow, and is then measured; what blows up is seen as such.
    """
    if memory is None:
        return None
    return dataclasses.replace(memory, vector=norm(gradient).astype(memory.vector.dtype))
