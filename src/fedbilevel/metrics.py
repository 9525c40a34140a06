"""A user's metrics, and the columns of the history that they may not be named after."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import PyTree

from .algorithm import Info
from .errors import InputError, check

Metric = Callable[[PyTree, PyTree], ArrayLike]  # of x and y, one real number

COLUMNS = ("iteration", "rounds", "bytes_down", "bytes_up", "seconds")
STOPPED = "stopped"  # the column of the reason, where a callback stopped a run
_BESIDE = (
    "algorithm",
    "seed",
    "halvings",
    "turn",
    "candidates",
    STOPPED,
    "median_round_seconds",
    "rounds_with_failures",
    "step_sizes",
)  # in tables with them


def validation_loss(x: PyTree, y: PyTree) -> ArrayLike:
    """f(x, y) averaged over the federation: `metrics={"validation_loss": fb.validation_loss}`.

    A run measures it itself, on every engine: at each row of the history x and y go to all clients (whatever the cohort),
    each says its own outer loss over all its outer rows, and the mean is that of the clients' weights. The round and its
    bytes are counted in that row. Where clients fail or drop out, it is the mean of those that answer.

    Raises:
        InputError: always: it is a metric's name, for no clients are at hand here.
    """
    raise InputError(
        "fb.validation_loss is measured by the run, which asks the clients: it cannot be called. Where the data is at hand, "
        "fb.reference.outer_value(problem, data, x, y) computes it."
    )


def measured(name: str, metric: Metric, x: PyTree, y: PyTree) -> float:
    """What a metric says.

    Raises:
        InputError: it fails, or says anything else than one number.
    """
    try:
        value = metric(x, y)
    except Exception as error:  # whatever the user's metric raises
        raise InputError(f"the metric {name!r} failed: {type(error).__name__}: {error}") from error
    try:
        if np.shape(value) == () and not isinstance(value, str | bytes):
            return float(value)  # pyright: ignore[reportArgumentType]
    except Exception:  # no number
        pass
    shown = str(value) if len(str(value)) < 200 else type(value).__name__
    raise InputError(f"the metric {name!r} must return a scalar, one real number; it returned {shown}.")


def checked_metrics(metrics: Mapping[str, Metric] | None, diagnostics: Iterable[str] = ()) -> dict[str, Metric]:
    """The metrics by name.

    Args:
        diagnostics: the names of what the algorithm tells of an iteration.

    Raises:
        InputError: one is no function, or its name is no text or that of another column.
    """
    if metrics is None:
        return {}
    check(isinstance(metrics, Mapping), f"metrics= maps names to functions of (x, y); got {metrics!r}.")
    taken = names_taken(diagnostics)
    for name, metric in metrics.items():
        check(isinstance(name, str) and name, f"a metric's name is a text, not empty; got {name!r}.")
        check(callable(metric), f"the metric {name!r} is a function of (x, y); got {metric!r}.")
        check(
            name not in taken,
            f"a metric cannot be named {name!r}, for the history has a column of that name: name it otherwise.",
        )
    return dict(metrics)


def names_taken(diagnostics: Iterable[str] = ()) -> set[str]:
    """The names of the history's other columns.

    Args:
        diagnostics: the names of what the algorithm tells of an iteration.
    """
    return {*COLUMNS, *_BESIDE, *(field.name for field in dataclasses.fields(Info)), *diagnostics}


def check_diagnostics(algorithm: str, names: Iterable[str]) -> None:
    """Refuse diagnostics of an algorithm that would take the place of another column."""
    for name in names:
        check(
            isinstance(name, str) and name not in {*COLUMNS, *_BESIDE},
            f"{algorithm}.step tells of {name!r}, and the history has a column of that name: name it otherwise.",
        )


def check_constants(names: Iterable[str], columns: Iterable[str]) -> None:
    """Refuse constant columns of a CSV file that have the names of the history's."""
    same = sorted(set(names) & {*columns, STOPPED})
    check(not same, f"CSV(extra=...) cannot have {', '.join(same)}, for the history has it: name it otherwise.")
