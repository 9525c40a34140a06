"""The best step sizes of an algorithm on a run: a grid in one program, and on from its edge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .. import reference
from ..description import Description
from ..engines.simulation import Simulation
from ..errors import InputError, RunError, check, unknown_name
from ..results.curves import direction, running_median
from .grid import points, sweep

GRID: dict[str, tuple[float, ...]] = {
    "inner_lr": (0.01, 0.03, 0.1, 0.3),
    "hessian_lr": (0.01, 0.03, 0.1, 0.3),
    "outer_lr": (0.03, 0.1, 0.3, 1.0, 3.0),
}
OUTER_LOSS = "validation_loss"  # what is judged where no metric is named: f(x, y) over all clients
_EVALUATIONS = 10  # of one run, the last five of which are judged
_STEP = 10**0.5  # how far beyond its edge the grid goes on


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        settings: the best step sizes.
        score: the metric there: the median of the last five evaluations of a run, as a mean over the runs.
        metric: its name; one that ends in "accuracy" is to rise, any other to fall.
        tried: every point with its score, infinite (or minus infinite) where a run blew up.
        edge: step sizes whose best value is still the outermost that was tried.
    """

    settings: dict[str, float]
    score: float
    metric: str
    tried: list[tuple[dict[str, float], float]]
    edge: tuple[str, ...]


def search(
    runs: Sequence[Description],
    grid: Mapping[str, Sequence[float]] | None = None,
    *,
    metric: str | None = None,
    wider: int = 3,
    progress: Callable[[float, str], None] = lambda done, news: None,
) -> Found:
    """Try step sizes on a run, all with the same cohorts, rows and random numbers.

    Args:
        runs: the run that is judged, in simulation, with one seed each: a point's score is the mean over them.
        grid: values by step size; those that the algorithm does not have are left out. None: `GRID`.
        metric: one of the runs' metrics; None: the outer loss f(x, y) over all clients' rows.
        wider: how many times the grid goes on where its best point lies at an edge.
        progress: told now and then what share of the grid at hand is done, and a word about it.

    Raises:
        InputError: a run cannot be used, or there is no such metric or step size.
        RunError: every point blew up.
    """
    check(len(runs) > 0, "a search needs a run to judge: give at least one.")
    kind = type(runs[0].algorithm)
    has = {f.name for f in dataclasses.fields(kind) if f.metadata.get("role") == "rate"}
    if grid is not None:
        for name, values in grid.items():
            _check_values(name, values, has, kind.__name__)
    tried = {name: tuple(values) for name, values in (GRID if grid is None else grid).items() if name in has}
    check(tried, f"the grid has no step size of {kind.__name__}: it has {', '.join(sorted(has))}.")
    if metric is not None and metric not in runs[0].metrics:
        raise unknown_name("metric of this run", metric, [*runs[0].metrics])
    judged = Scores(runs, metric, progress)
    judged.add(points(tried))
    for _ in range(wider):
        more = judged.beyond()
        if not more:
            break
        judged.add(more)
    if not np.isfinite(judged.best[1]):
        raise RunError(f"every point of the grid of {kind.__name__} blew up: give smaller step sizes with grid=.")
    return Found(*judged.best, judged.name, judged.tried, tuple(judged.edges()))


class Scores:
    """Points with their scores, in the order in which they were tried."""

    def __init__(self, runs: Sequence[Description], metric: str | None, progress: Callable[[float, str], None]):
        self.name = metric or OUTER_LOSS
        self._runs, self._metric, self._progress = runs, metric, progress
        self._sign = direction(self.name)
        self.tried: list[tuple[dict[str, float], float]] = []

    @property
    def best(self) -> tuple[dict[str, float], float]:
        """The best point, the first of equals."""
        return max(self.tried, key=lambda each: self._sign * each[1])

    def add(self, several: Sequence[Mapping[str, float]]) -> None:
        """Judge points."""
        scores = np.mean([self._one(run, several) for run in self._runs], axis=0)
        self.tried += [(dict(point), float(score)) for point, score in zip(several, scores, strict=True)]

    def edges(self) -> list[str]:
        """The step sizes whose best value is the outermost of several."""
        values = {name: {point[name] for point, _ in self.tried} for name in self.best[0]}
        return [name for name, at in self.best[0].items() if len(values[name]) > 1 and at in _ends(values[name])]

    def beyond(self) -> list[dict[str, float]]:
        """The best point's neighbours beyond the edges that it lies at."""
        here, ways = self.best[0], {}
        for name, at in here.items():
            low = at == min(point[name] for point, _ in self.tried)
            out = at / _STEP if low else at * _STEP
            ways[name] = (at, float(f"{out:.3g}")) if name in self.edges() else (at,)
        known = [point for point, _ in self.tried]
        return [point for point in points(ways) if point not in known]

    def _one(self, run: Description, several: Sequence[Mapping[str, float]]) -> list[float]:
        """Each point's score in one run."""
        with run.bits():
            data, (x, y), engine = run.rows(), run.begin(), run.engine or Simulation()
            if not isinstance(engine, Simulation):
                raise InputError(f"a search runs in simulation, many points in one program; got {engine!r}.")
            of = lambda x, y: reference.outer_value(run.problem, data, x, y)
            taken = of if self._metric is None else run.metrics[self._metric]
            rounds, every = self._budget(run, several[0])
            curves = sweep(
                run.problem, data, run.algorithm, several, x, y, rounds=rounds, key=run.key, engine=engine,
                metrics={self.name: taken}, evaluate_every=every, progress=self._progress,
            )  # fmt: skip
        ends = [running_median(curve.metrics[self.name])[-1] for curve in curves]
        return [float(end) if np.isfinite(end) else -self._sign * np.inf for end in ends]

    @staticmethod
    def _budget(run: Description, point: Mapping[str, float]) -> tuple[int, int]:
        """(rounds, iterations between evaluations); steps that are not of the grid may be measured, which takes rounds."""
        protocol = dataclasses.replace(run, algorithm=dataclasses.replace(run.algorithm, **point)).protocol()
        most, rare = protocol.rounds_most, protocol.rounds_rarely
        iterations = int(run.iterations or (int(run.rounds or 0) - rare) // most)
        return int(run.rounds or int(run.iterations or 0) * most + rare), max(1, iterations // _EVALUATIONS)


def _ends(values: set[float]) -> tuple[float, float]:
    return min(values), max(values)


def _check_values(name: str, values: Sequence[float], has: set[str], algorithm: str) -> None:
    """Refuse values of a step size that the algorithm does not have, or that are none."""
    if name not in has:
        raise unknown_name(f"step size of {algorithm}", name, has)
    good = len(values) > 0 and all(isinstance(v, int | float) and np.isfinite(v) and v > 0 for v in values)
    check(good, f"the grid of {name} is positive numbers, at least one; got {list(values)!r}.")
