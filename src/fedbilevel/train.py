"""`train`: the lower level alone, over the federation, at an x that stays where it is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import jax
from jaxtyping import PyTree

from . import errors
from .algorithms.components.inner_step import rounds_of_first
from .algorithms.components.steps import Rate
from .algorithms.training import Training
from .by_client import ClientMetrics
from .callbacks.base import Callback
from .cohorts import check_cohort
from .data import FederatedData
from .engines.base import Engine
from .given import Whole, whole_number
from .keys import KeyLike
from .metrics import Metric
from .problem import Problem
from .protocol import check_kinds
from .result import Result
from .run import Run
from .validation import asked, judged
from .variables import trainable


def train(
    problem: Problem,
    data: FederatedData,
    x: PyTree,
    y: PyTree,
    *,
    rounds: Whole,
    key: KeyLike,
    engine: Engine | None = None,
    inner_lr: Rate | str = "auto",
    local_steps: Whole = 5,
    batch_size: Whole | None = None,
    callbacks: Sequence[Callback] = (),
    metrics: Mapping[str, Metric] | None = None,
    evaluate_every: Whole = 1,
    keep: str | None = None,
    resume: str | os.PathLike[str] | None = None,
    check: bool = True,
    client_metrics: ClientMetrics | None = None,
) -> Result:
    """Minimise g(x, y) over y, at the x given: with settings as they are, or at those that were found.

    One iteration is a round of local steps, corrected so that clients that differ leave no floor
    (`Training`). Its messages are shorter than those of an algorithm that moves x.

    Args:
        problem, data: what to train, on which data; only the inner loss is asked for.
        x: where the upper variable stays.
        y: where to start. Both are pytrees of floating-point arrays (equinox modules too); with
            inner_lr="auto" the leaves of y are of one dtype.
        rounds: communication rounds, those that measure the step included: the whole iterations that
            fit are done.
        key: a `jax.random.key`; the same key gives the same run on every engine.
        engine: `Simulation()` (the default) or `Loopback()`, with their `cohort=`.
        inner_lr: the step of ONE local step, or "auto": it is measured, in as many rounds as it takes
            to ask everybody (20 at most) at the start, in one in iterations 1, 2, 4, 8, and so on.
        local_steps: local steps a round.
        batch_size: rows of a minibatch, fresh for every local step; None for all rows.
        callbacks, metrics, evaluate_every, keep, resume, client_metrics: as `solve` takes them.
        check: look, before the first iteration, whether the inner loss depends on y and curves
            upwards in it.

    Returns:
        A `Result`: x as it was given, y trained; in its history the columns lower_gradient_norm,
        |d_y g| at the old y, and inner_lr, the step taken, zero in a round that moved nothing.

    Raises:
        InputError: something cannot be used, or the rounds are too few for one iteration.
        Diverged: y blew up; its `result` holds everything up to the last finite iteration.
        RunError: as `solve`.
    """
    algorithm = Training(inner_lr, local_steps, batch_size)  # pyright: ignore[reportArgumentType]
    check_kinds(problem, data, algorithm)
    budget = whole_number(rounds, 1, "rounds= is a whole number of at least 1")
    if algorithm.pace.measures:
        _check_one_dtype(y)
        cohort = check_cohort(getattr(engine, "cohort", None), data.clients)
        rows = client_metrics or judged(asked(keep, metrics or {}))
        room = max(budget - 2, 2) if rows else budget  # start and end are measured in a round each (`Run`)
        algorithm = _within(algorithm, room, rounds_of_first(data.clients, cohort))
    run = Run(
        problem=problem, data=data, algorithm=algorithm, x=x, y=y, rounds=budget, key=key, engine=engine,
        callbacks=callbacks, metrics=metrics, evaluate_every=evaluate_every, keep=keep, resume=resume,
        sane=check, upper=False, client_metrics=client_metrics,
    )  # fmt: skip
    return run.go()


def _check_one_dtype(y: PyTree) -> None:
    """Refuse what no step is measured for."""
    kinds = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(trainable(y, "y")[0])})
    errors.check(
        len(kinds) == 1,
        f'inner_lr="auto" needs a y whose arrays are of one dtype; it has {" and ".join(kinds)}. Make '
        "them one, or give inner_lr= a number.",
    )


def _within(algorithm: Training, budget: int, first: int) -> Training:
    """The same, measuring less where the budget holds no whole first iteration.

    Raises:
        InputError: there is no room for one round that measures and one that trains.
    """
    errors.check(
        budget > 1,
        "1 round is too few: the first measures the step, the second trains. Give rounds= of at least 2, or inner_lr= a "
        "number.",
    )
    if budget > first:
        return algorithm
    return Training(algorithm.inner_lr, algorithm.local_steps, algorithm.batch_size, budget - 1)
