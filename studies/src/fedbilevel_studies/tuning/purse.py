"""What a rival spends, and what it has found: the library's ledger counts every round and byte.

Training is `fb.train`, with the step that it finds; what measuring it takes is among its rounds.
f is measured by one exchange with everybody, one round.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

import fedbilevel as fb
from fedbilevel.tasks import Task

from .grounds import Ground

EVERY = 5  # iterations of a run between two looks at x
Told = dict[str, Float[Array, ""]]


class Point(NamedTuple):
    """What a contender would return from here on: x, after so many rounds and bytes."""

    rounds: int
    bytes: int
    x: PyTree


class Trail(fb.callbacks.Callback):
    """Keeps x, and what it took, at every row of a run's history.

    Args:
        rounds, bytes: spent before the run.
    """

    def __init__(self, rounds: int = 0, bytes: int = 0) -> None:
        self.before = rounds, bytes
        self.points: list[Point] = []

    def record(self, run: fb.callbacks.Running, rows: list) -> None:
        """One point more."""
        rounds, bytes = self.before
        spent = rounds + run.rounds, bytes + run.bytes_down + run.bytes_up
        self.points.append(Point(*spent, run.x))


class Spent(Exception):
    """There is no room for what was to be paid."""


class Evaluation(fb.Algorithm):
    """A server program of one exchange: f(x, y), by everybody."""

    def step(self, fed: fb.Federation, state: fb.State) -> tuple[fb.State, Told]:
        """The state as it is, and f there."""
        everyone = fed.draw_cohort(fed.clients)
        return state, {"value": fed.average(self.value, state.x, state.y, cohort=everyone)}

    def value(self, client: fb.Client, x: PyTree, y: PyTree) -> Float[Array, ""]:
        """f_i(x, y) over all of the client's outer rows."""
        return client.problem.outer_value(x, y, client.outer)


@dataclasses.dataclass
class Purse:
    """A budget of rounds, and the best x that it has paid for.

    Attributes:
        ground, task: what is tuned.
        budget: rounds in all.
        key: of what is drawn in training, a new one for each.
        rounds, bytes: spent so far; bytes of all clients, both ways.
        best: the lowest f seen.
        trail: what would be returned, whenever that changes; the start x before anything is paid.
    """

    ground: Ground
    task: Task
    budget: int
    key: Key[Array, ""]
    rounds: int = 0
    bytes: int = 0
    best: float = np.inf
    trail: list[Point] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.trail.append(Point(0, 0, self.task.x))

    def train(self, x: PyTree, y: PyTree, rounds: int) -> PyTree | None:
        """y after so many more rounds at x; None if it blew up, whose rounds are paid all the same.

        Raises:
            Spent: the budget holds no such training and the exchange that judges it.
        """
        self.afford(rounds + 1)
        self.key, key = jax.random.split(self.key)
        try:
            result = fb.train(
                self.task.problem, self.task.data, x, y, rounds=rounds, key=key,
                engine=self.ground.engine(), batch_size=self.ground.batch_size,
                evaluate_every=rounds, check=False,
            )  # fmt: skip
        except fb.Diverged as error:
            self._pay(error.result.history[-1])
            return None
        self._pay(result.history[-1])
        return result.y

    def solve(self, algorithm: fb.Algorithm, rounds: int) -> tuple[list[Point], fb.Result | None]:
        """(A run's points, every `EVERY` iterations; its result, None if it blew up).

        Raises:
            Spent: the budget holds no such run.
        """
        self.afford(rounds)
        self.key, key = jax.random.split(self.key)
        task, trail, failed = self.task, Trail(self.rounds, self.bytes), False
        try:
            result = fb.solve(
                task.problem, task.data, algorithm, task.x, task.y, rounds=rounds, key=key,
                engine=self.ground.engine(), evaluate_every=EVERY, callbacks=[trail], check=False,
            )  # fmt: skip
        except fb.Diverged as error:
            result, failed = error.result, True
        self._pay(result.history[-1])
        return trail.points, None if failed else result

    def tune(self, rounds: int) -> list[Point]:
        """The points of a run of `fb.tune`, every `EVERY` iterations.

        Raises:
            Spent: the budget holds no such run.
        """
        self.afford(rounds)
        self.key, key = jax.random.split(self.key)
        task, trail = self.task, Trail(self.rounds, self.bytes)
        try:
            result = fb.tune(
                task.problem, task.data, task.x, task.y, rounds=rounds, key=key, engine=self.ground.engine(),
                batch_size=self.ground.batch_size, evaluate_every=EVERY, callbacks=[trail], check=False,
            )  # fmt: skip
        except fb.Diverged as error:
            result = error.result
        self._pay(result.history[-1])
        return trail.points

    def send(self, values: PyTree) -> None:
        """Pay for what goes to every client once, before a run."""
        self.bytes += self.task.data.clients * sum(leaf.nbytes for leaf in jax.tree.leaves(values))

    def value(self, x: PyTree, y: PyTree | None) -> float:
        """f(x, y), by a round of its own; infinite where there is no y, or f is not finite.

        Raises:
            Spent: there is no round left.
        """
        if y is None:
            return np.inf
        self.afford(1)
        task = self.task
        run = fb.solve(task.problem, task.data, Evaluation(), x, y, 1, key=task.key, check=False)
        self._pay(run.history[-1])
        value = float(run.history[-1]["value"])
        return value if np.isfinite(value) else np.inf

    def trial(self, x: PyTree, rounds: int) -> float:
        """f after a training from the task's first y at x: a whole run, and its judgement."""
        value = self.value(x, self.train(x, self.task.y, rounds))
        self.saw(x, value)
        return value

    def saw(self, x: PyTree, value: float) -> None:
        """x is what is returned from here on if none was better."""
        if value < self.best:
            self.best = value
            self.trail.append(Point(self.rounds, self.bytes, x))

    def afford(self, rounds: int) -> None:
        """Nothing, where the budget holds so many rounds more.

        Raises:
            Spent: it does not.
        """
        if self.rounds + rounds > self.budget:
            raise Spent

    def _pay(self, last: dict) -> None:
        self.rounds += int(last["rounds"])
        self.bytes += int(last["bytes_down"]) + int(last["bytes_up"])
