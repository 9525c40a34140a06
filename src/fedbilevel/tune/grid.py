"""A grid of step sizes in one compiled program: the same cohorts, rows and random numbers for every point."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from ..algorithm import Algorithm
from ..beginning import first_state
from ..cohorts import check_cohort
from ..component import title_of
from ..data import FederatedData
from ..engines.base import Carry
from ..engines.simulation import Simulation
from ..errors import check
from ..foreign import as_given
from ..metrics import Metric
from ..own_lower import Lower
from ..problem import Problem, bind, strong
from ..protocol import running
from ..variables import trainable

_ROOM = 1.5e9  # bytes that the rows and hidden values of one exchange may take, over all points at once
_BLOWN_UP = 1e10


@dataclasses.dataclass(frozen=True)
class Curve:
    """What one point of a grid did.

    Attributes:
        settings: its step sizes.
        rounds: (evaluations,) communication rounds up to each evaluation, the start included.
        metrics: name -> (evaluations,), NaN from where the run blew up.
    """

    settings: dict[str, float]
    rounds: np.ndarray
    metrics: dict[str, np.ndarray]


def points(grid: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """Every combination of the values of a grid."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def sweep(
    problem: Problem,
    data: FederatedData,
    algorithm: Algorithm,
    grid: Sequence[Mapping[str, float]],
    x: PyTree,
    y: PyTree,
    *,
    rounds: int,
    key: Key[Array, ""],
    engine: Simulation | None = None,
    metrics: Mapping[str, Metric],
    evaluate_every: int = 1,
    at_once: int | None = None,
    arrived: Callable[[Curve], float] = lambda curve: math.inf,
    progress: Callable[[float, str], None] = lambda done, news: None,
) -> list[Curve]:
    """Run an algorithm at every point of a grid of step sizes.

    Args:
        algorithm: the counts and options, equal for all points.
        grid: step sizes by name, one mapping per point, all with the same names.
        rounds: the budget of each run: the whole iterations that fit its most.
        metrics: name -> fn(x, y) -> scalar, taken at the start and every `evaluate_every` iterations.
        at_once: how many points one program runs; by default as many as about 1.5 GB hold.
        arrived: the round at which a curve so far is where it is to go, infinite for not yet. Runs end at twice the
            lowest of them.
        progress: told now and then what share is done, in [0, 1], and a word about it.

    Returns:
        A `Curve` for each point, in order.
    """
    check(len(grid) > 0, "the grid of a sweep is empty.")
    engine = engine or Simulation()
    inner_x, x_rest = trainable(x, "x")
    inner_y, y_rest = trainable(y, "y")
    algorithm = dataclasses.replace(algorithm, **grid[0])
    whole, asks = bind(problem, x_rest, y_rest), check_cohort(engine.cohort, data.clients)
    algorithm = running(algorithm, whole, data, inner_x, inner_y, asks)  # what is not of the grid may be "auto"
    state = first_state(algorithm, inner_x, inner_y)
    execution = engine.bind(whole, data, algorithm, state, key)
    iterations = (rounds - execution.protocol.rounds_rarely) // execution.protocol.rounds_most
    check(iterations >= 1, f"{rounds} rounds are too few for one iteration of {title_of(algorithm)}.")
    size = at_once or _fitting(data, algorithm, execution.protocol.cohort, inner_y)
    curves: list[Curve] = []
    start, lower = execution.start(algorithm, state), Lower(execution, algorithm, state, y_rest)
    limit = _BLOWN_UP * max([1.0, *(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves((inner_x, inner_y)))])
    evaluate = lambda x, y: {
        name: float(np.asarray(fn(as_given(eqx.combine(x, x_rest), x_rest), as_given(eqx.combine(y, y_rest), y_rest))))
        for name, fn in metrics.items()
    }
    end = math.inf
    for part in _groups(grid, size):
        stacked = algorithm
        for name in part[0]:
            values = jnp.asarray([point[name] for point in part], jnp.result_type(float))
            stacked = eqx.tree_at(lambda a, n=name: getattr(a, n), stacked, values)
        stacked = _spread_over(stacked, len(part))
        carry = Carry(strong(_copies(start.state, len(part))), _copies(start.client_state, len(part)), 0)
        at_start = evaluate(inner_x, inner_y)
        seen = [[at_start] for _ in part]
        spent = [[0] for _ in part]
        alive = np.ones(len(part), bool)
        of = lambda k, part=part, seen=seen, spent=spent: Curve(
            dict(part[k]), np.array(spent[k]), {name: np.array([row[name] for row in seen[k]]) for name in metrics}
        )
        while carry.iteration < iterations and alive.any() and min(used[-1] for used in spent) < end:
            length = min(evaluate_every, iterations - carry.iteration)
            carry, used, _, _, done = execution.advance_many(stacked, carry, length, limit)
            alive &= done >= length
            for k in range(len(part)):
                spent[k].append(spent[k][-1] + int(sum(used[k])))
                lane = lambda tree, k=k: jax.tree.map(lambda leaf: leaf[k], tree)
                own = Carry(lane(carry.state), lane(carry.client_state), carry.iteration)
                numbers = evaluate(own.state.x, lower.one(own)) if alive[k] else {}
                seen[k].append({name: numbers.get(name, np.nan) for name in metrics})
            end = min([end, *(2 * arrived(of(k)) for k in range(len(part)) if alive[k])])
            done = (len(curves) + len(part) * carry.iteration / iterations) / len(grid)
            several = f"point {len(curves) + 1} to {len(curves) + len(part)} of {len(grid)}"
            progress(done, f"{several}, iteration {carry.iteration} of {iterations}")
        curves += [of(k) for k in range(len(part))]
    return curves


def _spread_over(algorithm: Algorithm, many: int) -> Algorithm:
    """The algorithm with every number a leaf of `many` values."""

    def wide(leaf: PyTree) -> PyTree:
        if isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
            return jnp.broadcast_to(jnp.asarray(leaf), (many,))
        return leaf

    return jax.tree.map(wide, algorithm)


def _copies(tree: PyTree, many: int) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (many, *leaf.shape)), tree)


def _fitting(data: FederatedData, algorithm: Algorithm, cohort: int, y: PyTree) -> int:
    """How many points fit: each holds its own hidden values of the cohort's rows, about as large as the rows."""
    batch, cut = getattr(algorithm, "batch_size", None), data.inner.cut(cohort)
    rows = cohort * (batch or data.inner.most) if batch or cut is None else cut.size * (cut.together + cut.capacity)
    row = sum(leaf[0].size * leaf.dtype.itemsize for leaf in jax.tree.leaves(data.inner.rows))
    own = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(y))
    return max(1, int(_ROOM // (rows * row + 4 * cohort * own)))


def _groups(grid: Sequence[Mapping[str, float]], size: int) -> Iterator[list[Mapping[str, float]]]:
    for first in range(0, len(grid), size):
        yield list(grid[first : first + size])
