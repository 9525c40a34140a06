"""Stopping when a metric no longer gets better, or is good enough."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Literal

from ..best import BETTER
from ..errors import InputError, check, unknown_name
from ..given import Whole, whole_number
from ..result import EMPTY
from .base import Callback, Row, Running

_AS_GOOD = {"min": operator.le, "max": operator.ge}


class EarlyStopping(Callback):
    """Stops a run whose metric has not got better for a while, or has reached a target: at the same row on any machine.

    A run that is resumed, or goes back, goes by the rows that its history has.

    Args:
        metric: one of the run's metrics, by name.
        direction: "min" if it is to fall, "max" if it is to rise.
        patience: after how many rows without a better value the run stops; `evaluate_every` says how far apart they are.
        min_delta: by how much more a value has to differ from the best one to be better.
        target: the run also stops at a value that is as good as this; None: at none.

    Raises:
        InputError: a setting cannot be used; at the start of a run, that it has no such metric.
    """

    def __init__(
        self,
        metric: str,
        direction: Literal["min", "max"],
        patience: Whole = 10,
        min_delta: float = 0.0,
        target: float | None = None,
    ):
        if direction not in BETTER:
            raise unknown_name("direction", direction, BETTER)
        self.metric, self.direction = metric, direction
        self.patience = whole_number(patience, 1, "EarlyStopping(patience=) is a whole number of at least 1")
        self.min_delta = _number("min_delta", min_delta)
        check(self.min_delta >= 0, f"EarlyStopping(min_delta=) is a number of at least 0; got {min_delta!r}.")
        self.target = None if target is None else _number("target", target)
        self._forget()

    def start(self, run: Running) -> None:
        if self.metric not in run.metrics:
            raise _no_such_metric(self.metric, run.metrics)
        self._look_back(run)

    def record(self, run: Running, rows: list[Row]) -> None:
        self._look(run, rows)

    def went_back(self, run: Running) -> None:
        self._look_back(run)

    def _forget(self) -> None:
        self._best, self._at, self._waited = math.nan, 0, 0

    def _look_back(self, run: Running) -> None:
        self._forget()
        self._look(run, run.history)

    def _look(self, run: Running, rows: Iterable[Row]) -> None:
        """Take rows into account, and judge by the last of them."""
        value = math.nan
        for row in rows:
            if (found := row.get(self.metric, EMPTY)) is not EMPTY:  # else it was not taken there
                value = float(found)
                self._take(value, int(row["iteration"]))
        if self.target is not None and math.isfinite(value) and _AS_GOOD[self.direction](value, self.target):
            run.stop(f"{self.metric} is {value:.6g}, as good as the target {self.target:.6g}")
        elif self._waited >= self.patience:
            best = "never finite" if math.isnan(self._best) else f"best at iteration {self._at}, {self._best:.6g}"
            run.stop(f"{self.metric} has not got better for {self.patience} rows ({best})")

    def _take(self, value: float, iteration: int) -> None:
        change = self.min_delta if self.direction == "max" else -self.min_delta
        better = math.isnan(self._best) or BETTER[self.direction](value, self._best + change)
        if math.isfinite(value) and better:
            self._best, self._at, self._waited = value, iteration, 0
        else:
            self._waited += 1


def _number(name: str, value: object) -> float:
    """A finite number.

    Raises:
        InputError: it is none.
    """
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        number = math.nan
    good = math.isfinite(number) and not isinstance(value, str | bool)
    check(good, f"EarlyStopping({name}=) is a finite number; got {value!r}.")
    return number


def _no_such_metric(name: str, known: Iterable[str]) -> InputError:
    known = list(known)
    if known:
        return unknown_name("metric", name, known)
    return InputError(f"there is no metric {name!r}: the run has none; pass metrics={{{name!r}: fn(x, y)}}.")
