"""The first stage of a study: each contender's best step sizes and variant, from one equal grid.

A point of the grid is judged by the first round at which the median of five consecutive evaluations is at the goal; one
that never gets there, or is not there at the end, by how far it is from it at the end. The end is the grid's budget, or
twice the round at which the first point was at the goal. A contender is judged by the mean over the grid's seeds.

A study may let the grid go on: from the best point to its neighbours that were not tried, until none is better. So the
values that all begin with hold nobody back. (What a second look then chooses of the best few may have neighbours untried.)

The soonest points are often on the edge of stability. A study may therefore run its best few once more, on a seed of its
own and for the whole budget of the final runs, and take the best of those. Where each of them blows up on some seed,
as many more are looked at: else a contender whose soonest points are unstable would be held to less than the others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas
import tomlkit

from fedbilevel.callbacks import Meter
from fedbilevel.memory import release
from fedbilevel.results import direction, first_reached, running_median
from fedbilevel.tune import Curve, sweep

from .kinds import Cell, DataDir, Setting
from .study import Contender, Study

Telling = Callable[[str], None]
Point = dict[str, Setting]  # of a grid
Chosen = Mapping[str, Mapping[str, Setting]]  # label -> the point that the grid chose
Row = dict[str, Cell]  # of grid.csv
_FAR = 9.0  # goals off at the end: as good as blown up


def search(study: Study, folder: Path, data_dir: DataDir, say: Telling) -> dict[str, Point]:
    """Each contender's best step sizes and variant; every finished point is kept in grid.csv."""
    best = {}
    for contender in study.contenders:
        grid = _Grid(study, contender, folder / "grid.csv", data_dir, say)
        points = study.candidates(contender)
        ranked = grid.rank(points, study.grid_seeds, study.grid_rounds)
        for _ in range(study.beyond):
            further = neighbours(ranked[0], points, study.rates(contender))
            before, points = ranked[0], [*points, *further]
            ranked = grid.rank(points, study.grid_seeds, study.grid_rounds)
            if ranked[0] == before:
                break
        if study.shortlist_seeds:
            ranked = _second_look(grid, ranked, contender.rounds or study.rounds)
        best[contender.label] = ranked[0]
        release()
        say(f"{contender.label}: best {best[contender.label]}")
    return best


def _second_look(grid: _Grid, ranked: list[Point], rounds: int) -> list[Point]:
    """The best few from best to worst; as many more are looked at until one held on all seeds."""
    study = grid.study
    for count in range(study.shortlist, len(ranked) + study.shortlist, study.shortlist):
        few = grid.rank(ranked[:count], study.shortlist_seeds, rounds, whole=True)
        if any(grid.held(point, study.shortlist_seeds, rounds) for point in few):
            break
    return few


def neighbours(best: Point, tried: list[Point], rates: Iterable[str]) -> list[Point]:
    """The points next to the best one, in one step size each, that were not tried; beyond the ends, by the same ratio."""
    found = []
    for name in rates:
        values = sorted({as_number(point[name]) for point in tried if name in point})
        if len(values) < 2:  # it is not searched
            continue
        at = values.index(as_number(best[name]))
        below = values[at - 1] if at else _short(values[0] * values[0] / values[1])
        above = values[at + 1] if at + 1 < len(values) else _short(values[-1] * values[-1] / values[-2])
        found += [{**best, name: value} for value in (below, above)]
    return [point for point in found if point not in tried]


def as_number(value: Setting) -> float:
    """A step size of a point, which is a number."""
    assert isinstance(value, int | float)
    return value


def _short(value: float) -> float:
    """Without the dust of a division."""
    return float(f"{value:.6g}")


@dataclasses.dataclass
class _Grid:
    """A contender's points with their scores: what was finished in an earlier session is taken from the file."""

    study: Study
    contender: Contender
    file: Path
    data_dir: DataDir
    say: Telling
    rows: list[Row] = dataclasses.field(init=False)

    def __post_init__(self):
        exists = self.file.is_file()
        kept = pandas.read_csv(self.file).to_dict("records") if exists else []
        self.rows = [{str(name): value for name, value in row.items()} for row in kept]

    def rank(self, points: list[Point], seeds: tuple[int, ...], rounds: int, whole: bool = False) -> list[Point]:
        """The points from best to worst; `whole`: all their runs go to the end of the budget."""
        for seed in seeds:
            scores = [self._score(point, seed) for point in points]
            missing = [point for point, score in zip(points, scores, strict=True) if score is None]
            if missing:
                soonest = min((score for score in scores if score is not None), default=math.inf)
                self.rows += self._try(missing, seed, rounds, math.inf if whole else soonest, whole)
                beside = self.file.with_suffix(".tmp")  # so that an interrupt leaves the old or the new file
                pandas.DataFrame(self.rows).to_csv(beside, index=False)
                beside.replace(self.file)
        mean = lambda point: sum(self._score(point, seed) or 0.0 for seed in seeds) / len(seeds)
        return sorted(points, key=mean)

    def held(self, point: Point, seeds: tuple[int, ...], rounds: int) -> bool:
        """Whether a point that was tried on the seeds blew up on none."""
        return all((self._score(point, seed) or 0.0) < (1 + _FAR) * rounds for seed in seeds)

    def _score(self, point: Point, seed: int) -> float | None:
        """Of the point's row, if it was tried on the seed; a number read from a file may be off by its last digit."""
        same = lambda a, b: a == b or (isinstance(b, float) and math.isclose(a, b, rel_tol=1e-9))
        for row in self.rows:
            mine = row["label"] == self.contender.label and row["seed"] == seed
            if mine and all(same(row[name], value) for name, value in point.items()):
                score = row["score"]
                assert score is not None
                return float(score)
        return None

    def _try(self, points: list[Point], seed: int, rounds: int, soonest: float, whole: bool) -> list[Row]:
        """A row for each of the points."""
        study, contender = self.study, self.contender
        task, engine = study.build(contender, seed, self.data_dir)

        def arrived(curve: Curve) -> float:
            return (
                math.inf if whole else min(soonest, judge(study, curve.rounds, curve.metrics[study.metric], rounds)[0])
            )

        rows = []
        for variant in contender.variants:
            steps = [
                {n: as_number(v) for n, v in p.items() if n not in variant}
                for p in points
                if variant.items() <= p.items()
            ]
            if not steps:
                continue
            named = "".join(f", {name} {value}" for name, value in variant.items())
            with Meter(f"{study.name}: grid, {contender.label}{named}, seed {seed}", 1.0) as meter:
                curves = sweep(
                    task.problem, task.data, contender.build(variant), steps, task.x, task.y,
                    rounds=rounds, key=task.key, engine=engine, evaluate_every=study.every,
                    metrics={study.metric: task.metrics[study.metric]}, progress=meter.update, arrived=arrived,
                )  # fmt: skip
            for curve in curves:
                values = curve.metrics[study.metric]
                reached, score = judge(study, curve.rounds, values, rounds)
                rows.append({
                    "label": contender.label, "seed": seed, **variant, **curve.settings,
                    "rounds_to_goal": reached, "end": float(running_median(values)[-1]), "score": score,
                })  # fmt: skip
        best = min(row["score"] for row in rows)
        self.say(f"{contender.label}, grid of {len(rows)} on seed {seed}: best score {best:.0f}")
        return rows


def judge(study: Study, rounds: np.ndarray, values: np.ndarray, budget: int) -> tuple[float, float]:
    """(the round at which the goal is reached, infinite for never; the score of the run, lower is better).

    A run that is at the goal early and falls back is no good: its score is that of one that never got there.
    """
    sign = direction(study.metric)
    at = first_reached(sign * values, sign * study.goal)
    reached = float("inf") if at is None else float(rounds[at])
    short = sign * (study.goal - running_median(values)[-1])
    if short <= 0:
        return reached, reached
    missed = min(short / max(abs(study.goal), 1e-12), _FAR) if np.isfinite(short) else 10.0  # worst of all: it blew up
    return reached, budget * (1 + float(missed))


def write_settings(file: Path, best: Chosen) -> None:
    """What the grid chose, as TOML, a section a contender."""
    file.write_text(tomlkit.dumps(best))
