"""The best x and y of a run, by a column of its history: what `keep="test_loss:min"` asks for."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import PyTree

from .arrays import is_key, numbers, on_device, restore
from .errors import InputError, check, unknown_name
from .given import JSON

BETTER = {"min": operator.lt, "max": operator.gt}
_FORM = "keep= names a metric and its direction, as in 'test_loss:min' or 'test_accuracy:max'"

Variables: TypeAlias = tuple[PyTree, PyTree]  # (x, y)


class Best(NamedTuple):
    """The best x and y of a run.

    Attributes:
        x, y: the variables, structured like the start; y as `Result` has it (the mean, where clients have their own).
        iteration, rounds: those of the row of the history that is the best.
        value: the metric there.
    """

    x: PyTree
    y: PyTree
    iteration: int
    rounds: int
    value: float


class Goal(NamedTuple):
    """What a run is judged by: a column of its history, and whether it is to fall ("min") or to rise ("max")."""

    metric: str
    direction: str

    def __str__(self) -> str:
        return f"{self.metric}:{self.direction}"

    def better(self, value: float, other: Best | None) -> bool:
        """Whether a value counts, and is better than another one's."""
        return math.isfinite(value) and (other is None or BETTER[self.direction](value, other.value))

    def known(self, names: Iterable[str]) -> None:
        """Refuse a column that no row will have.

        Args:
            names: the metrics and diagnostics that there are.

        Raises:
            InputError: it is none of them.
        """
        names = list(dict.fromkeys(names))  # a metric may be called as what the run measures itself
        if self.metric not in names:
            raise _no_such(self.metric, names)


def goal(keep: str) -> Goal:
    """What `keep=` says.

    Raises:
        InputError: it names no metric, no direction, or another direction than "min" and "max".
    """
    check(isinstance(keep, str), f"{_FORM}; got {keep!r}.")
    metric, _, direction = keep.rpartition(":")
    check(metric and direction, f"{_FORM}; got {keep!r}.")
    if direction not in BETTER:
        raise unknown_name("direction", direction, BETTER)
    return Goal(metric, direction)


def _no_such(name: str, known: Sequence[str]) -> InputError:
    if known:
        return unknown_name("metric", name, known)
    return InputError(f"there is no metric {name!r} to keep by: the run has none; pass metrics={{{name!r}: fn(x, y)}}.")


class Kept:
    """The best x and y so far, on the host: one copy, and a second where rows may be given up yet.

    A run that goes back gives up its last rows, and what was the best among those that stay counts again.
    A last row off the grid of `evaluate_every` counts in the result alone: a run that goes on from there has no such row.

    Args:
        goal: what it is judged by.
        every: iterations between rows.
    """

    def __init__(self, goal: Goal, every: int):
        self.goal, self._every = goal, every
        self._best: Best | None = None
        self._spare: Best | None = None  # the best of the rows up to where the run may go back to, if that is another
        self._last: Best | None = None  # the last row, off the grid and better

    @property
    def best(self) -> Best | None:
        """The best so far, arrays of numpy; None before there is a finite value."""
        return self._last or self._best

    def look(self, row: Mapping[str, float | str], variables: Callable[[], Variables], back: int | None) -> None:
        """Take a row into account.

        Args:
            variables: () -> (x, y), those of the row.
            back: the iteration that the run may go back to; None: it never does.
        """
        value, iteration = float(row[self.goal.metric]), int(row["iteration"])
        if not self.goal.better(value, self._best):
            return
        x, y = variables()
        new = Best(_held(x), _held(y), iteration, int(row["rounds"]), value)
        if iteration % self._every:
            self._last = new
            return
        if back is not None and self._best is not None and self._best.iteration <= back:
            self._spare = self._best
        self._best = new
        if back is None or iteration <= back:
            self._spare = None

    def went_back(self, iteration: int) -> None:
        """Forget what was found after an iteration, to which the run went back."""
        if self._best is not None and self._best.iteration > iteration:
            self._best = self._spare
        self._spare = self._last = None

    def result(self, like: Variables) -> Best | None:
        """The best, with arrays of JAX where `like`, (x, y) as they stand, has them."""
        best = self.best
        return None if best is None else best._replace(x=_given(like[0], best.x), y=_given(like[1], best.y))

    def nothing(self, rows: int) -> str:
        """A sentence for a run that has ended without a finite value."""
        return (
            f"keep={str(self.goal)!r} found no best: {self.goal.metric} is not finite at any of the {rows} rows of the "
            "history. x and y are the last ones; look at the metric, or keep by another one."
        )

    def saved(self) -> tuple[dict[str, JSON], dict[str, PyTree]]:
        """(Words and numbers, arrays) for a checkpoint."""
        both = {"best": self._best, "spare": self._spare}
        there = {name: each for name, each in both.items() if each is not None}
        told: dict[str, JSON] = {name: [each.iteration, each.rounds, each.value] for name, each in there.items()}
        return {"keep": str(self.goal), **told}, {name: (each.x, each.y) for name, each in there.items()}

    def restore(
        self, told: Mapping[str, JSON] | None, parts: Mapping[str, Sequence[np.ndarray]], like: Variables, whose: str
    ) -> None:
        """Go on from what a checkpoint holds.

        Args:
            like: (x, y), structured like those that were saved.
            whose: the checkpoint, in words.

        Raises:
            InputError: it keeps nothing, or by something else.
        """
        theirs = None if told is None else str(told["keep"])
        check(
            theirs == str(self.goal),
            f"{whose} keeps {'no best' if theirs is None else repr(theirs)}, and this run {str(self.goal)!r}: "
            "go on with the same keep=, or start again.",
        )
        held = tuple(map(_held, like))
        read = lambda name: _read(told[name], restore(held, parts[name])) if told and name in told else None
        self._best, self._spare = read("best"), read("spare")


def _read(told: JSON, variables: Variables) -> Best:
    iteration, rounds, value = told  # pyright: ignore[reportGeneralTypeIssues]
    return Best(*variables, int(iteration), int(rounds), float(value))


def _is_ours(leaf: PyTree) -> bool:
    return isinstance(leaf, jax.Array) and not is_key(leaf)


def _held(tree: PyTree) -> PyTree:
    """The same, with its JAX arrays copied to the host."""
    return jax.tree.map(lambda leaf: np.array(numbers(leaf)) if _is_ours(leaf) else leaf, tree)


def _given(like: PyTree, held: PyTree) -> PyTree:
    """What was held, with JAX arrays where `like` has them."""
    return jax.tree.map(lambda now, then: on_device(then) if _is_ours(now) else then, like, held)
