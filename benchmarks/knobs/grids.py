"""Grids of step sizes: every point side by side in one program, kept in a folder as they come.

inner_lr and hessian_lr in {.03, .1, .3, 1} / L, outer_lr in five values a factor ten apart around the best
of a coarse search: with both other steps .3 / L, outer_lr 1e-5 .. 1e5, by Phi at the end of the first seed's
run. Where the best point (by the median over seeds) has the least or the largest outer_lr, another value is
added beyond it. `adam`: outer_lr is the learning rate of optax.adam at the server.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedbilevel as fb
from knobs.problems import Case, Contestant, largest_curvature
from knobs.quality import quality

LOWER, COARSE, TOGETHER = (0.03, 0.1, 0.3, 1.0), tuple(range(-5, 6)), 16
EQUAL, LOOKED_AT = 0.01, 4
HELD = 0.9  # of the first seed's best gain: what a point has to reach there to be tried on others, on heavy tasks
Point = tuple[float, float, int]  # inner_lr L, hessian_lr L, the power of ten of outer_lr


@dataclasses.dataclass(frozen=True)
class Curve:
    """What a run did: Phi at looks, and the rounds up to each."""

    rounds: np.ndarray
    values: np.ndarray

    @property
    def end(self) -> float:
        return float(self.values[-1])


def arrival(curve: Curve, end: float, gain: float) -> float:
    """The first round at or below end + .1 gain whose next three looks stay below end + .15 gain; infinite for none."""
    near, held = curve.values <= end + 0.1 * gain, curve.values < end + 0.15 * gain
    for k in np.flatnonzero(near):
        if held[k + 1 : k + 4].all():
            return float(curve.rounds[k])
    return np.inf


def paths(stepper: fb.stepper, points: dict[str, jax.Array], key: jax.Array, looks: int, every: int):
    """(x at every look, leaves (points, looks + 1, ...); rounds (points, looks); whether the end is finite)."""

    def one(point):
        algorithm, at = stepper.algorithm, stepper.start
        for name, value in point.items():
            if name != "adam":
                algorithm = eqx.tree_at(lambda a, n=name: getattr(a, n), algorithm, value)
            else:
                at = eqx.tree_at(lambda at: at.state.optimizer.hyperparams["learning_rate"], at, value)

        def turn(at, k):
            at, rounds = stepper(at, k, key, algorithm)
            return at, rounds

        def stretch(at, first):
            at, rounds = jax.lax.scan(turn, at, first + jnp.arange(every))
            return at, (at.state.x, jnp.sum(rounds))

        end, (xs, rounds) = jax.lax.scan(stretch, at, every * jnp.arange(looks))
        xs = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), at.state.x, xs)
        small = [jnp.all(jnp.abs(leaf) < 1e10) for leaf in jax.tree.leaves((end.state.x, end.state.y))]
        return xs, rounds, jnp.all(jnp.stack(small))

    return jax.lax.map(one, points, batch_size=TOGETHER)


class Grid:
    """The grid of one task, algorithm and kind of outer step, over seeds; what was computed is read from `folder`."""

    def __init__(self, case: Case, contestant: Contestant, adam: bool, seeds: tuple[int, ...], folder: Path):
        self.case, self.contestant, self.adam, self.seeds = case, contestant, adam, seeds
        self.folder = folder / case.name / (contestant.name + "-adam" * adam)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.found: dict[tuple[Point, int], Curve | None] = {}  # None: blown up
        self._tasks: dict[int, tuple] = {}
        iterations = contestant.budget // self._rounds()
        self.looks = iterations // contestant.every

    def _rounds(self) -> int:
        return {"lockstep": 1, "simfbo": 1, "aggitd": 13, "fednest": 18}[self.contestant.name]

    def run(self) -> Point:
        """All of it; the best point."""
        middle = self.centre()
        powers = [middle + k for k in range(-2, 3)]
        while True:
            grid = [(a, b, p) for a, b, p in itertools.product(LOWER, LOWER, sorted(powers))]
            self.compute(self.seeds[0], grid)
            for seed in self.seeds[1:]:
                self.compute(seed, self._kept(grid))
            best = self.best()
            beyond = {min(powers): min(powers) - 1, max(powers): max(powers) + 1}.get(best[2])
            if beyond is None or len(powers) >= 9:
                return best
            powers.append(beyond)

    def centre(self) -> int:
        """The power of ten of the best outer_lr of the coarse search."""
        line = [(0.3, 0.3, p) for p in COARSE]
        self.compute(self.seeds[0], line)
        return min(line, key=lambda point: self.end(point, self.seeds[0]))[2]

    def _kept(self, grid: list[Point]) -> list[Point]:
        if not self.case.heavy:
            return grid
        seed = self.seeds[0]
        start = next(curve for curve in self.found.values() if curve is not None).values[0]
        ends = np.array([self.end(point, seed) for point in grid])
        return [point for point, end in zip(grid, ends, strict=True) if start - end >= HELD * (start - ends.min())]

    def best(self) -> Point:
        """By the median over seeds of the end."""
        points = {point for point, _ in self.found}
        whole = [p for p in points if all((p, seed) in self.found for seed in self.seeds)]
        return min(whole, key=lambda p: (np.median([self.end(p, seed) for seed in self.seeds]), p))

    def end(self, point: Point, seed: int) -> float:
        curve = self.found.get((point, seed))
        return np.inf if curve is None else curve.end

    def fastest(self) -> Point:
        """Of the points whose end is within a hundredth of the gain of the best one's, that which arrives first.

        By medians over seeds. Where many points end at the solution the best one is best by a rounding error,
        and may be slow: this is the harder rival.
        """
        best, goals = self.best(), {seed: self.goal(seed) for seed in self.seeds}
        gains = {seed: self.gain(seed) for seed in self.seeds}
        whole = {point for point, _ in self.found} & {p for p, seed in self.found if seed == self.seeds[-1]}
        gap = lambda point, seed: (self.end(point, seed) - goals[seed]) / gains[seed]
        equals = [p for p in whole if np.median([gap(p, seed) for seed in self.seeds]) <= EQUAL]
        if self.case.heavy:  # a look takes long there
            equals = sorted(equals, key=lambda p: (np.median([gap(p, seed) for seed in self.seeds]), p))[:LOOKED_AT]
        curves = {seed: self.curves(seed, equals) for seed in self.seeds}
        late = lambda p: np.median([arrival(curves[seed][p], goals[seed], gains[seed]) for seed in self.seeds])
        return min(equals, key=lambda p: (late(p), p != best, p))

    def gain(self, seed: int) -> float:
        """From the start, y trained, to the goal."""
        start = next(curve for (_, own), curve in self.found.items() if own == seed and curve is not None).values[0]
        return float(start) - self.goal(seed)

    def goal(self, seed: int) -> float:
        """The best point's end; on a seed on which that one blows up, the lowest of all."""
        best = self.end(self.best(), seed)
        return best if np.isfinite(best) else min(self.end(point, own) for point, own in self.found if own == seed)

    def curves(self, seed: int, points: list[Point]) -> dict[Point, Curve]:
        """The whole curves of points, of which the grid knows start and end only."""
        file = self.folder / f"curves-{seed}.npz"
        held = dict(np.load(file)) if file.exists() else {}
        new = [point for point in points if _name(point) not in held]
        if new:
            xs, rounds, _ = self._paths(seed, new)
            count = jax.tree.leaves(xs)[0].shape[1]
            flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), xs)
            values = quality(self._task(seed)[0])(flat).reshape(len(new), count)
            held["rounds"] = np.concatenate([[0], np.cumsum(rounds[0])])
            held |= {_name(point): values[k] for k, point in enumerate(new)}
            np.savez(file, **held)
        return {point: Curve(held["rounds"], held[_name(point)]) for point in points}

    def compute(self, seed: int, grid: list[Point]) -> None:
        """Ends of all points of one seed, those that no file has."""
        file = self.folder / f"ends-{seed}.npz"
        held = dict(np.load(file)) if file.exists() else {}
        new = [point for point in grid if _name(point) not in held]
        if new:
            xs, _, fine = self._paths(seed, new)
            ends = quality(self._task(seed)[0])(jax.tree.map(lambda leaf: leaf[:, -1], xs))
            if "start" not in held:
                held["start"] = quality(self._task(seed)[0])(jax.tree.map(lambda leaf: leaf[:1, 0], xs))[0]
            for k, point in enumerate(new):
                held[_name(point)] = ends[k] if fine[k] else np.inf
            np.savez(file, **held)
            good = sum(np.isfinite(held[_name(point)]) for point in new)
            print(
                f"  {self.folder.parent.name} {self.folder.name} seed {seed}: {len(new)} points, {good} finite",
                flush=True,
            )
        looks = np.array([0, self.contestant.budget])
        for point in grid:
            end = float(held[_name(point)])
            self.found[point, seed] = Curve(looks, np.array([held["start"], end])) if np.isfinite(end) else None

    def steps(self, seed: int, point: Point) -> dict[str, float]:
        curvature = self._task(seed)[1]
        return {"inner_lr": point[0] / curvature, "hessian_lr": point[1] / curvature, "outer_lr": 10.0 ** point[2]}

    def blown_up(self) -> tuple[int, int]:
        """(Points that blew up, points) of the first seed."""
        own = [curve for (_, seed), curve in self.found.items() if seed == self.seeds[0]]
        return sum(curve is None for curve in own), len(own)

    def _task(self, seed: int):
        if seed not in self._tasks:
            task = self.case.task(seed)
            self._tasks[seed] = task, largest_curvature(task)
        return self._tasks[seed]

    def _paths(self, seed: int, points: list[Point]):
        task, _ = self._task(seed)
        steps = {"inner_lr": 1.0, "hessian_lr": 1.0, "outer_lr": 1.0}
        if self.adam:
            steps["outer_optimizer"] = optax.inject_hyperparams(optax.adam)(learning_rate=1.0)
        algorithm = self.contestant(self.case.batch, **steps)
        bound = fb.stepper(task.problem, task.data, algorithm, task.x, task.y, engine=self.case.engine)
        given = [self.steps(seed, point) for point in points]
        columns = {name: jnp.array([each[name] for each in given]) for name in given[0]}
        if self.adam:
            columns["adam"] = columns.pop("outer_lr")
        short = -len(points) % TOGETHER if len(points) > TOGETHER else 0  # whole groups: one program for all
        columns = {name: jnp.concatenate([col, jnp.repeat(col[-1:], short)]) for name, col in columns.items()}
        out = bound.compiled(paths, columns, task.key, self.looks, self.contestant.every)
        return jax.tree.map(lambda leaf: np.asarray(leaf[: len(points)]), out)


def _name(point: Point) -> str:
    return "{:g}_{:g}_{:d}".format(*point)
