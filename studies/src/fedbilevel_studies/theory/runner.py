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

from fedbilevel.algorithm import Algorithm, State
from fedbilevel.algorithms import AggITD
from fedbilevel.data import FederatedData
from fedbilevel.engines import Simulation
from fedbilevel.engines.simulation import _SimulatedFederation, _Static
from fedbilevel.federation import Federation
from fedbilevel.problem import Problem, strong
from fedbilevel.protocol import as_leaves, client_state

STALLED = 1_000  # iterations without progress after which a race is given up

Program = Callable[[Algorithm, Federation, PyTree], tuple[PyTree, dict[str, Array]]]  # as `Algorithm.step`
Stationarity = Callable[[PyTree], Float[Array, ""]]  # x -> |grad Phi(x)|^2
States = tuple[PyTree, PyTree]  # of the server and of all clients
Sites = tuple[tuple[int, ...], ...]  # the exchanges of an iteration that are rounds
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

    def bind(self, algorithm: Algorithm, program: Program) -> tuple[_Static, States, Sites]:
        """(the static part of the compiled program, state and clients' states before the first iteration, round counts)."""
        state = algorithm.init(self.x, self.y)
        engine = Simulation(cohort=self.cohort)
        bound = engine.bind(self.problem, self.data, algorithm, state, self.key, program)
        sites = bound.protocol.sites
        layout = tuple(sorted((path, site.flags) for path, site in sites.items()))
        static = _Static(program, bound.protocol.cohort, None, None, layout)
        one = client_state(algorithm, state)
        many = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.data.clients, *leaf.shape)), one)
        return static, (strong(state), many), tuple(sorted(path for path, site in sites.items() if site.round))


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
    static, states, _ = setup.bind(algorithm, program)
    out = _lanes(static, setup.problem, setup.data, stack(as_leaves(algorithm), **leaves), states, setup.key)
    return np.asarray(out.x)


@eqx.filter_jit
def _lanes(
    static: _Static,
    problem: Problem,
    data: FederatedData,
    algorithms: Algorithm,
    states: States,
    key: Key[Array, ""],
) -> PyTree:
    def one(algorithm: Algorithm) -> PyTree:
        fed = _SimulatedFederation(static, problem, data, algorithm, jax.random.fold_in(key, 0), *states)
        return static.program(algorithm, fed, states[0])[0]

    return eqx.filter_vmap(one, in_axes=(_batched(algorithms),))(algorithms)


def draws(setup: Setup, algorithm: Algorithm, program: Program, count: int) -> np.ndarray:
    """(count, dim) what the program estimates, with as many keys: cohorts and random numbers drawn anew for each."""
    static, states, _ = setup.bind(algorithm, program)
    which = jnp.arange(count, dtype=jnp.int32)
    return np.asarray(_draws(static, setup.problem, setup.data, as_leaves(algorithm), states, setup.key, which))


@eqx.filter_jit
def _draws(
    static: _Static,
    problem: Problem,
    data: FederatedData,
    algorithm: Algorithm,
    states: States,
    key: Key[Array, ""],
    which: Int[Array, " draws"],
) -> PyTree:
    def one(k: Count) -> PyTree:
        fed = _SimulatedFederation(static, problem, data, algorithm, jax.random.fold_in(key, k), *states)
        return static.program(algorithm, fed, states[0])[0].x

    return jax.lax.map(one, which, batch_size=500)


def _batched(algorithms: Algorithm) -> PyTree:
    """in_axes: the first axis of every leaf that has one."""
    return jax.tree.map(lambda leaf: 0 if eqx.is_array(leaf) and leaf.ndim else None, algorithms)


def _step(algorithm: Algorithm, fed: Federation, state: PyTree) -> tuple[PyTree, dict[str, Array]]:
    state, _ = algorithm.step(fed, state)
    return state, {}


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
    static, states, counted = setup.bind(algorithm, _step)
    algorithms = stack(as_leaves(algorithm), **leaves)
    lanes = len(next(iter(leaves.values())))
    states = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (lanes, *leaf.shape)), states)
    limits = jnp.asarray(tolerance, float), jnp.asarray(rounds, jnp.int32)
    out = _race(static, counted, setup.stationarity, setup.problem, setup.data, algorithms, states, setup.key, *limits)
    iterations, used, last, lowest = (np.asarray(part) for part in out)
    reached = last < tolerance
    lane = int(np.argmin(np.where(reached, last, np.inf))) if reached.any() else None
    return Race(lane, int(used), int(iterations), last, float(lowest))


# iteration, rounds used, states, |grad Phi|^2 of all lanes, the lowest so far, and what that was at the last mark
_Loop = tuple[Count, Count, States, Float[Array, " lanes"], Float[Array, ""], Float[Array, ""]]


@eqx.filter_jit
def _race(
    static: _Static,
    counted: Sites,
    stationarity: Stationarity,
    problem: Problem,
    data: FederatedData,
    algorithms: Algorithm,
    states: States,
    key: Key[Array, ""],
    tolerance: Float[Array, ""],
    rounds: Count,
) -> tuple[Count, Count, Float[Array, " lanes"], Float[Array, ""]]:
    one = _one_lane(static, counted, problem, data, key)
    advance = eqx.filter_vmap(one, in_axes=(None, _batched(algorithms), 0), out_axes=(0, None))

    def going(loop: _Loop) -> Bool[Array, ""]:
        k, used, _, value, lowest, mark = loop
        stalled = (k % STALLED == 0) & (k > 0) & (lowest > 0.99 * mark)
        return (used < rounds) & ~jnp.any(value < tolerance) & jnp.any(value < 1e12) & ~stalled  # NaN: blown up

    def body(loop: _Loop) -> _Loop:
        k, used, states, value, lowest, mark = loop
        mark = jnp.where(k % STALLED == 0, lowest, mark)
        states, more = advance(k, algorithms, states)
        value = jax.vmap(stationarity)(states[0].x)
        return k + 1, used + more, states, value, jnp.fmin(lowest, jnp.nanmin(value)), mark

    zero, start = jnp.zeros((), jnp.int32), jax.vmap(stationarity)(states[0].x)
    loop = (zero, zero, states, start, jnp.min(start), jnp.asarray(jnp.inf, start.dtype))
    k, used, _, value, lowest, _ = jax.lax.while_loop(going, body, loop)
    return k, used, value, lowest


def _one_lane(
    static: _Static, counted: Sites, problem: Problem, data: FederatedData, key: Key[Array, ""]
) -> Callable[[Count, Algorithm, States], tuple[States, Count]]:
    keyed = _one_keyed(static, counted, problem, data)
    return lambda k, algorithm, states: keyed(k, algorithm, states, key)


def _one_keyed(
    static: _Static, counted: Sites, problem: Problem, data: FederatedData
) -> Callable[[Count, Algorithm, States, Key[Array, ""]], tuple[States, Count]]:
    def one(k: Count, algorithm: Algorithm, states: States, key: Key[Array, ""]) -> tuple[States, Count]:
        fed = _SimulatedFederation(static, problem, data, algorithm, jax.random.fold_in(key, k), *states)
        state, _ = static.program(algorithm, fed, states[0])
        counts = fed.counts or {}
        used = sum((counts[path][0] for path in counted), jnp.zeros((), jnp.int32))
        return (state, fed.client_state), used

    return one


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
    static, states, counted = setup.bind(algorithm, _step)
    algorithms = stack(as_leaves(algorithm), **leaves)
    lanes = len(next(iter(leaves.values())))
    states = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (lanes, *leaf.shape)), states)
    each = jnp.asarray(max(1, iterations // blocks), jnp.int32)
    used, value = _curves(
        static, counted, setup.stationarity, blocks, setup.problem, setup.data, algorithms, states,
        setup.key if keys is None else keys, each,
    )  # fmt: skip
    used = np.asarray(used)
    return used if used.ndim == 1 else used.mean(1), np.asarray(value).T


# iteration, rounds used (of each lane, where each has a key of its own), states; and |grad Phi|^2 summed over turns
_Place = tuple[Count, Int[Array, " ..."], States]
_Turns = tuple[Count, Int[Array, " ..."], States, Float[Array, " lanes"]]


@eqx.filter_jit
def _curves(
    static: _Static,
    counted: Sites,
    stationarity: Stationarity,
    blocks: int,
    problem: Problem,
    data: FederatedData,
    algorithms: Algorithm,
    states: States,
    key: Key[Array, " ..."],
    each: Count,
) -> tuple[Int[Array, "blocks ..."], Float[Array, "blocks lanes"]]:
    one, keyed = _one_keyed(static, counted, problem, data), key.ndim > 0
    axes = (None, _batched(algorithms), 0, 0 if keyed else None)
    advance = eqx.filter_vmap(one, in_axes=axes, out_axes=(0, 0 if keyed else None))
    nothing = jnp.zeros(key.shape, jnp.int32)

    def turn(i: Count, loop: _Turns) -> _Turns:
        k, used, states, total = loop
        states, more = advance(k, algorithms, states, key)
        return k + 1, used + more, states, total + jax.vmap(stationarity)(states[0].x)

    def block(loop: _Place, _: None) -> tuple[_Place, tuple[Int[Array, " ..."], Float[Array, " lanes"]]]:
        k, used, states = loop
        start = (k, used, states, jnp.zeros_like(jax.vmap(stationarity)(states[0].x)))
        k, used, states, total = jax.lax.fori_loop(0, each, turn, start)
        return (k, used, states), (used, total / each.astype(total.dtype))

    return jax.lax.scan(block, (jnp.zeros((), jnp.int32), nothing, states), None, length=blocks)[1]
