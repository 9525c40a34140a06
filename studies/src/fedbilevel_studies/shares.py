"""How much of a hypergradient goes through y*: its implicit part, beside its direct one."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import optax.tree
from jaxtyping import Array, Float, PyTree

from fedbilevel import Algorithm, Diverged, Estimator, Simulation, estimator
from fedbilevel.callbacks import Callback, Running
from fedbilevel.tasks import Task


def estimates(algorithm: Algorithm) -> bool:
    """Whether the algorithm has an estimator of the hypergradient, whose parts can be told apart."""
    return type(algorithm).estimate is not Algorithm.estimate


class Shares(Callback):
    """Now and then, what share of the hypergradient estimate is its implicit part.

    At the run's x and y the algorithm's own estimator is run twice with the same key: as it is, h = direct + implicit,
    and on the problem whose outer loss does not see x, which leaves the implicit part alone. The share is
    |implicit| / (|direct| + |implicit|).
    """

    def __init__(self, file: Path, task: Task, engine: Simulation, label: str, seed: int, every: int):
        self.file, self.task, self.engine, self.every = file, task, engine, every
        self.named = {"algorithm": label, "seed": seed}
        self._both: tuple[Estimator, Estimator] | None = None  # of the whole, and of its implicit part
        self._next = 0

    def start(self, run: Running) -> None:
        self._next = run.iteration
        if not self.file.exists():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text("algorithm,seed,iteration,rounds,implicit,direct,share\n")

    def advance(self, run: Running) -> None:
        if run.iteration < self._next:
            return
        self._next = run.iteration + self.every
        implicit, direct = self._parts(run)
        share = implicit / (implicit + direct) if implicit + direct > 0 else float("nan")
        cells = [*self.named.values(), run.iteration, run.rounds, implicit, direct, share]
        with self.file.open("a", newline="") as file:
            csv.writer(file).writerow(cells)

    def _parts(self, run: Running) -> tuple[float, float]:
        if self._both is None:
            problem = self.task.problem
            assert problem.outer is not None  # no study is of an outer loss of means
            bound = lambda each: estimator(each, self.task.data, run.algorithm, run.x, run.y, engine=self.engine)
            self._both = bound(problem), bound(dataclasses.replace(problem, outer=_Blind(problem.outer)))
        try:
            whole, implicit = (estimate(run.x, run.y, self.task.key)[0] for estimate in self._both)
        except Diverged:
            return math.nan, math.nan
        return float(optax.tree.norm(implicit)), float(optax.tree.norm(optax.tree.sub(whole, implicit)))


class _Blind(eqx.Module):
    """An outer loss that takes x for a constant."""

    loss: Callable[..., Float[Array, ""]]

    def __call__(self, x: PyTree, *rest: PyTree) -> Float[Array, ""]:
        return self.loss(jax.lax.stop_gradient(x), *rest)
