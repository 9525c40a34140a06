"""How much of a hypergradient goes through y*: its implicit part, beside its direct one."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import optax.tree
from jaxtyping import Array, Float, PyTree

from fedbilevel.algorithm import Algorithm, State
from fedbilevel.callbacks import Callback
from fedbilevel.callbacks.base import Running
from fedbilevel.engines import Simulation
from fedbilevel.engines.base import Carry, Execution
from fedbilevel.problem import Loss
from fedbilevel.solve import estimate
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
        self._runs: list[Execution] | None = None
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
        if self._runs is None:
            problem = self.task.problem
            blind = dataclasses.replace(problem, outer=_Blind(problem.outer))
            state = State(run.carry.state.x, run.carry.state.y)
            self._runs = [
                self.engine.bind(each, self.task.data, run.algorithm, state, self.task.key, estimate)
                for each in (problem, blind)
            ]
        start = run.carry.state
        found = []
        for execution in self._runs:
            at = Carry(State(start.x, start.y), execution.start(run.algorithm, State(start.x, start.y)).client_state, 0)
            carry, _ = execution.advance(run.algorithm, at, 1, float("inf"))
            found.append(carry.state.x)
        whole, implicit = found
        return float(optax.tree.norm(implicit)), float(optax.tree.norm(optax.tree.sub(whole, implicit)))


class _Blind(eqx.Module):
    """An outer loss that takes x for a constant."""

    loss: Loss

    def __call__(self, x: PyTree, *rest: PyTree) -> Float[Array, ""]:
        return self.loss(jax.lax.stop_gradient(x), *rest)
