"""Many settings of one algorithm in one compiled program: `jax.vmap` over its leaves, one key for all or for each.

What `solve` does for one algorithm, without its rows, callbacks and checks: a study asks for one number out of
thousands of short runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from fedbilevel import (
    AggITD,
    Algorithm,
    FederatedData,
    Federation,
    Problem,
    Simulation,
    Standing,
    State,
    Stepper,
    stepper,
)

STALLED = 1_000  # iterations without progress after which a race is given up
PLACES = {"inner_lr": 0.01, "hessian_lr": 0.01, "outer_lr": 0.05}  # steps that nobody gave: lanes take their place, or
# nothing depends on them (an estimate needs no outer_lr)

Program = Callable[[Algorithm, Federation, PyTree], tuple[PyTree, PyTree]]  # as `Algorithm.step`
Stationarity = Callable[[PyTree], Float[Array, ""]]  # x -> |grad Phi(x)|^2
Count = Int[Array, ""]
Lanes = np.ndarray | Sequence[float]  # the values of one setting, a lane each


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is solved: a problem, its data, a start, how many clients are asked, and a key.

    Attributes:
        stationarity: x -> |grad Phi(x)|^2, in jax.
        curvatures: the largest of g and of Phi.
    """

    problem: Problem
    data: FederatedData
    x: PyTree
    y: PyTree
    stationarity: Stationarity | None = None
    curvatures: tuple[float, float] = (1.0, 1.0)
    cohort: int | None = None
    key: Key[Array, ""] = dataclasses.field(default_factory=lambda: jax.random.key(0))

    def bind(self, algorithm: Algorithm, **program: Program) -> Stepper:
        """The algorithm's iterations, or those of a `program=` of its own."""
        engine = Simulation(cohort=self.cohort)
        found = [name for name in PLACES if isinstance(getattr(algorithm, name, None), str)]
        algorithm = dataclasses.replace(algorithm, **{name: PLACES[name] for name in found})
        return stepper(self.problem, self.data, algorithm, self.x, self.y, engine=engine, **program)


def stack(algorithm: Algorithm, **leaves: Lanes) -> Algorithm:
    """The algorithm with arrays (lanes,) as the named step sizes; "truncation" for a fixed Q."""
    for name, values in leaves.items():
        whole = name == "truncation"
        place = (lambda a: a.truncation.value) if whole else (lambda a, name=name: getattr(a, name))
        values = jnp.asarray(np.asarray(values), jnp.int32 if whole else jnp.result_type(float))
        algorithm = eqx.tree_at(place, algorithm, values)
    return algorithm


def hypergradient(algorithm: Algorithm, fed: Federation, state: PyTree) -> tuple[State, dict[str, Array]]:
    """A program: the estimate of the hypergradient in place of x."""
    h, y = algorithm.estimate(fed, state.x, state.y)
    return State(h, y), {}


def adjoint(algorithm: Algorithm, fed: Federation, state: PyTree) -> tuple[State, dict[str, Array]]:
    """A program: the estimate v of H^-1 d_y f in place of x."""
    assert isinstance(algorithm, AggITD)
    _, v, _, after, _ = algorithm.estimate_parts(fed, state)
    return State(v, after.y), {}


def estimates(setup: Setup, algorithm: Algorithm, program: Program = hypergradient, **leaves: Lanes) -> np.ndarray:
    """(lanes, dim) what the program estimates, for each of the stacked settings."""
    step = setup.bind(algorithm, program=program)
    return np.asarray(step.compiled(_lanes, stack(step.algorithm, **leaves), setup.key))


def _lanes(step: Stepper, algorithms: Algorithm, key: Key[Array, ""]) -> PyTree:
    one = lambda algorithm: step(step.start, 0, key, algorithm)[0].state.x
    return jax.vmap(one, in_axes=(_batched(algorithms),))(algorithms)


def draws(setup: Setup, algorithm: Algorithm, program: Program, count: int) -> np.ndarray:
    """(count, dim) what the program estimates, with as many keys: cohorts and random numbers drawn anew for each."""
    step = setup.bind(algorithm, program=program)
    return np.asarray(step.compiled(_draws, jnp.arange(count, dtype=jnp.int32), setup.key))


def _draws(step: Stepper, which: Int[Array, " draws"], key: Key[Array, ""]) -> PyTree:
    return jax.lax.map(lambda k: step(step.start, k, key)[0].state.x, which, batch_size=500)


def _batched(algorithms: Algorithm) -> PyTree:
    """in_axes: the first axis of every leaf that has one."""
    return jax.tree.map(lambda leaf: 0 if leaf.ndim else None, algorithms)


@dataclasses.dataclass(frozen=True)
class Race:
    """The lane that got there first, its rounds and iterations; |grad Phi|^2 of all lanes at the end, and the lowest."""

    lane: int | None
    rounds: int
    iterations: int
    last: np.ndarray
    lowest: float


def race(setup: Setup, algorithm: Algorithm, tolerance: float, rounds: int, **leaves: Lanes) -> Race:
    """Run all lanes side by side until the first has |grad Phi(x)|^2 < tolerance, or `rounds` are used up.

    Given up earlier if its lowest value among all lanes has not fallen by 1 % in `STALLED` iterations: that is a floor.

    All lanes take the same number of rounds an iteration: they share the key of what the server draws.
    """
    assert setup.stationarity is not None
    step = setup.bind(algorithm)
    limits = jnp.asarray(tolerance, float), jnp.asarray(rounds, jnp.int32)
    out = step.compiled(_race, stack(step.algorithm, **leaves), setup.stationarity, setup.key, *limits)
    iterations, used, last, lowest = (np.asarray(part) for part in out)
    reached = last < tolerance
    lane = int(np.argmin(np.where(reached, last, np.inf))) if reached.any() else None
    return Race(lane, int(used), int(iterations), last, float(lowest))


# iteration, rounds used, where the lanes stand, |grad Phi|^2 of each, the lowest so far, and what that was at the last mark
_Loop = tuple[Count, Count, Standing, Float[Array, " lanes"], Float[Array, ""], Float[Array, ""]]


def _race(
    step: Stepper,
    algorithms: Algorithm,
    stationarity: Stationarity,
    key: Key[Array, ""],
    tolerance: Float[Array, ""],
    rounds: Count,
) -> tuple[Count, Count, Float[Array, " lanes"], Float[Array, ""]]:
    one = lambda k, algorithm, at: step(at, k, key, algorithm)
    advance = jax.vmap(one, in_axes=(None, _batched(algorithms), 0), out_axes=(0, None))

    def going(loop: _Loop) -> Bool[Array, ""]:
        k, used, _, value, lowest, mark = loop
        stalled = (k % STALLED == 0) & (k > 0) & (lowest > 0.99 * mark)
        return (used < rounds) & ~jnp.any(value < tolerance) & jnp.any(value < 1e12) & ~stalled  # NaN: blown up

    def body(loop: _Loop) -> _Loop:
        k, used, at, value, lowest, mark = loop
        mark = jnp.where(k % STALLED == 0, lowest, mark)
        at, more = advance(k, algorithms, at)
        value = jax.vmap(stationarity)(at.state.x)
        return k + 1, used + more, at, value, jnp.fmin(lowest, jnp.nanmin(value)), mark

    at = _side_by_side(step.start, algorithms)
    zero, start = jnp.zeros((), jnp.int32), jax.vmap(stationarity)(at.state.x)
    loop = (zero, zero, at, start, jnp.min(start), jnp.asarray(jnp.inf, start.dtype))
    k, used, _, value, lowest, _ = jax.lax.while_loop(going, body, loop)
    return k, used, value, lowest


def _side_by_side(start: Standing, algorithms: Algorithm) -> Standing:
    """The start, once for each lane."""
    lanes = next(leaf.shape[0] for leaf in jax.tree.leaves(algorithms) if leaf.ndim)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (lanes, *leaf.shape)), start)


def curves(
    setup: Setup,
    algorithm: Algorithm,
    iterations: int,
    blocks: int,
    keys: Key[Array, " lanes"] | None = None,
    **leaves: Lanes,
) -> tuple[np.ndarray, np.ndarray]:
    """(rounds used up to the end of each block, mean |grad Phi(x)|^2 over each block), (blocks,) and (lanes, blocks).

    `keys`, one for each lane, in place of the setup's for all; rounds are then the mean over the lanes.
    """
    assert setup.stationarity is not None
    step = setup.bind(algorithm)
    each = jnp.asarray(max(1, iterations // blocks), jnp.int32)
    given = stack(step.algorithm, **leaves), setup.stationarity, setup.key if keys is None else keys, each
    used, value = step.compiled(_curves, blocks, *given)
    used = np.asarray(used)
    return used if used.ndim == 1 else used.mean(1), np.asarray(value).T


# iteration, rounds used (of each lane, where each has a key of its own), where they stand; |grad Phi|^2 summed over turns
_Place = tuple[Count, Int[Array, " ..."], Standing]
_Turns = tuple[Count, Int[Array, " ..."], Standing, Float[Array, " lanes"]]


def _curves(
    step: Stepper,
    blocks: int,
    algorithms: Algorithm,
    stationarity: Stationarity,
    key: Key[Array, " ..."],
    each: Count,
) -> tuple[Int[Array, "blocks ..."], Float[Array, "blocks lanes"]]:
    keyed = 0 if key.ndim else None
    one = lambda k, algorithm, at, key: step(at, k, key, algorithm)
    advance = jax.vmap(one, in_axes=(None, _batched(algorithms), 0, keyed), out_axes=(0, keyed))

    def turn(i: Count, loop: _Turns) -> _Turns:
        k, used, at, total = loop
        at, more = advance(k, algorithms, at, key)
        return k + 1, used + more, at, total + jax.vmap(stationarity)(at.state.x)

    def block(loop: _Place, _: None) -> tuple[_Place, tuple[Int[Array, " ..."], Float[Array, " lanes"]]]:
        k, used, at = loop
        start = (k, used, at, jnp.zeros_like(jax.vmap(stationarity)(at.state.x)))
        k, used, at, total = jax.lax.fori_loop(0, each, turn, start)
        return (k, used, at), (used, total / each.astype(total.dtype))

    start = jnp.zeros((), jnp.int32), jnp.zeros(key.shape, jnp.int32), _side_by_side(step.start, algorithms)
    return jax.lax.scan(block, start, None, length=blocks)[1]
