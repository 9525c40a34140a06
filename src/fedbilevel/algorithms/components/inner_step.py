"""`inner_lr="auto"`: the step of corrected local steps on y, from the largest curvature of a client.

Ours, not a paper's. Local steps act alone, so single clients' curvature counts: L is the largest of
all eigenvalues of the H_i. T steps of length b/L at client i move y, along an eigenvector of H_i of
eigenvalue h L/b, by S(h) times their first step, S(h) = (1 - (1-h)^T) / h with h in [0, b]; and its
control variate is a round old. Where all H_i have the same eigenvectors, the error of y along one is

    e_{k+1} = (1 - M) e_k + (M - N) e_{k-1},     M = mean h S(h),   N = (mean h) (mean S(h))
    0 <= N - M <= b (T - S(b)) / 4               (the inequality of Gruess)

and dies away while N - M < 1. The largest b <= 1 that keeps that bound at 1/2 is 1 for T <= 3, .6
for T = 5, and about 3/T beyond: T steps go three times as far as one, however much clients differ.
A cohort of s of m clients leaves the others' control variates older still: b shrinks from there (all
asked) to 1 / (3 T) (one asked), along with (m - s) / (s (m - 1)). The step is b / (1.2 L).

L is measured by five Lanczos steps of each client on one batch, one number up: at the start in as
many rounds as it takes to ask everybody, cohort by cohort (20 at most, then clients spread evenly
over all), and in one round in iterations 1, 2, 4, 8, ..., and whenever |d_y g| is four times as long
as at the last measurement. L falls to no less than .6 of what it was, .9 where clients or rows are
sampled.

In between every round tells, with one more number up, the steepest curvature along any client's own
path, |gradient's change| / |step|, of those steps that left the corrected gradient longer than twice
what the path began with (the gradient, or the corrected one): steps that are too long make it grow
without end. It raises L; and where it is beyond 1.8 L (a client that was not there to be measured,
rows that are rare, a loss that curves more elsewhere) the round moves nothing. That the gradient
grows is asked for because of kinks, such as a ReLU's: there it jumps by the same however short the
step, and the shorter the steps, the steeper they would look; but it jumps once, and descent that
slides along a kink does no harm. Where a run that blows up all the same goes on is said in
`curvature`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax.tree
from jaxtyping import Array, Bool, Float, Int, PyTree

from ...federation import Federation
from ...pace.curvature import GROWN, AutoStep, Curvature
from ...pace.inner import MOST as MOST
from ...pace.inner import everybody_in_turn, rounds_of_first
from ...pace.inner import share_of_curvature as share_of_curvature
from .steps import Gradient, descend, norm

_KEPT = 0.6  # of an earlier, larger curvature, at least: some may drop out at a measurement
_KEPT_SAMPLED = 0.9  # where clients or rows are sampled
_RISK = 1.5  # of the step's product with the curvature of a path, in units of b
_UNSEEN = 4.0  # how much larger a curvature is taken to be where a path left the range of numbers
_LONGER = 2.0  # than at the start of a path: a gradient that grows so much is no kink's
_ROUNDING = 100.0  # units in the last place, within which a gradient's change or a step says nothing


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
        cohort = None if fed.cohort_size == fed.clients else everybody_in_turn(fed, t + before.iteration, first)
        return jnp.maximum(seen, fed.maximum(auto.largest_curvature, x, y, cohort=cohort))

    kept = (_KEPT if everything else _KEPT_SAMPLED) * before.largest
    now = auto.renewed(before, due, fed.repeat(times, turn, kept, most=first))
    return now.step, now


def judged(memory: Curvature, steepest: Float[Array, ""], gradient: PyTree) -> tuple[Bool[Array, ""], Curvature]:
    """(Whether a round may move y, what is remembered) after it told of its paths, and of d_y g.

    No alarm is raised: d_y g may well grow, and is then measured; what blows up is seen as such.
    """
    steepest, known = steepest.astype(memory.largest.dtype), memory.largest
    safe = memory.step * steepest <= _RISK
    found = jnp.isfinite(steepest)
    largest = jnp.where(found, jnp.maximum(known, steepest), _UNSEEN * known)
    vector = norm(gradient).astype(memory.vector.dtype)
    return safe, dataclasses.replace(memory, largest=largest, vector=vector)


# The clients' side ------------------------------------------------------------------------------


def watched_descent(
    gradient: Gradient,
    start: PyTree,
    first: PyTree,
    correction: PyTree,
    lr: Float[Array, ""],
    steps: int,
    same_rows: bool,
) -> tuple[PyTree, Float[Array, ""]]:
    """(The end of `steps.controlled_descent`, the steepest curvature along its path).

    Where every step has rows of its own, or there is but one, the first one's gradient is taken
    again at its end.
    """
    slope = _secant(start, first, correction)
    after = descend(start, lr, optax.tree.add(first, correction))
    if steps == 1 or not same_rows:
        steepest = slope(start, after, first, gradient(0)(after))
        turn = lambda s, z: descend(z, lr, optax.tree.add(gradient(s)(z), correction))
        return jax.lax.fori_loop(1, steps, turn, after), steepest

    def step(s, path):
        before, last, z, steepest = path
        now = gradient(s)(z)
        steepest = jnp.maximum(steepest, slope(before, z, last, now))
        return z, now, descend(z, lr, optax.tree.add(now, correction)), steepest

    path = start, first, after, jnp.zeros_like(norm(start))
    _, _, end, steepest = jax.lax.fori_loop(1, steps, step, path)
    return end, steepest


def _secant(start: PyTree, first: PyTree, correction: PyTree) -> Callable[..., Float[Array, ""]]:
    """(before, after, gradient before, gradient after) -> |its change| / |the step|.

    Zero where the gradient did not grow, and where it is rounding; both are judged by the start of the path.
    """
    finest = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(start))
    shortest, faintest = (_ROUNDING * finest * norm(each) for each in (start, first))
    longest = _LONGER * jnp.maximum(norm(first), norm(optax.tree.add(first, correction)))

    def slope(before: PyTree, after: PyTree, last: PyTree, now: PyTree) -> Float[Array, ""]:
        length, change = norm(optax.tree.sub(after, before)), norm(optax.tree.sub(now, last))
        found = (change - faintest) / jnp.where(length > 0, length, jnp.ones_like(length))
        nothing = (norm(optax.tree.add(now, correction)) <= longest) | (length <= shortest) | (found <= 0)
        return jnp.where(nothing, jnp.zeros_like(found), found)

    return slope
