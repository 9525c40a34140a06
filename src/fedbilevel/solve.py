"""Run an algorithm: `solve` for the whole optimisation, `estimate_hypergradient` for its estimator alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from jaxtyping import PyTree

from .algorithm import Algorithm
from .by_client import ClientMetrics, Share
from .callbacks.base import Callback
from .data import FederatedData
from .engines.base import Engine
from .estimator import Estimator
from .given import Whole
from .keys import KeyLike
from .metrics import Metric
from .problem import Problem
from .protocol import check_kinds
from .result import Result
from .run import Run, check_key


def solve(
    problem: Problem,
    data: FederatedData,
    algorithm: Algorithm,
    x: PyTree,
    y: PyTree,
    iterations: Whole | None = None,
    *,
    rounds: Whole | None = None,
    key: KeyLike,
    engine: Engine | None = None,
    callbacks: Sequence[Callback] = (),
    metrics: Mapping[str, Metric] | None = None,
    evaluate_every: Whole = 1,
    keep: str | None = None,
    resume: str | os.PathLike[str] | None = None,
    check: bool = True,
    client_metrics: ClientMetrics | None = None,
    share_metrics: Share = "mean",
) -> Result:
    """Minimise f(x, y*(x)) over x.

    Args:
        problem, data, algorithm: what to solve, on which data, how.
        x, y: where to start, pytrees of floating-point arrays (equinox modules too).
        iterations: outer iterations; or instead
        rounds: communication rounds: the whole iterations that fit are done.
        key: a `jax.random.key`; the same key gives the same run on every engine.
        engine: `Simulation()` (the default) or `Loopback()`, with their `cohort=`.
        callbacks: `fedbilevel.callbacks`: Progress, CSV, Checkpoint, EarlyStopping, ..., or your own (see "Callbacks").
        metrics: name -> fn(x, y) -> scalar, taken at the start, every `evaluate_every` iterations, and at the end.
        evaluate_every: iterations between history rows.
        keep: a metric and a direction, as in "test_loss:min" or "test_accuracy:max": the x and y of the row of the history
            that is the best by it are kept too, and `result.best()` gives them. Beside the metrics it may be a scalar
            of what the algorithm tells of an iteration (`Info`), or "validation_loss", which is built in
            (`fedbilevel.validation_loss`).
        resume: a folder with a checkpoint of this very run, to go on from.
        check: look, before the first iteration, whether the problem can mean what it says: whether the losses depend on
            what they need, and whether the inner loss curves upwards in y at the start. One compiled call on some of
            the rows; no round, no byte. A resumed run is not checked again.
        client_metrics: name -> fn(x, y, row) -> scalar, a metric of ONE client: the mean over its outer rows, taken
            where they are. A pair of scalars is a ratio of means, and `fedbilevel.ByClient` says who is the worst. At
            each row of the history x and y go to all clients, in one exchange for all metrics (`validation_loss` too):
            the columns NAME, the mean over the clients by their weights, and NAME_worst. `result.clients` is the table
            at the end.
        share_metrics: what of clients' numbers travels, and is counted: what the mean takes ("mean"), each client's
            own too (True), nothing (False). In one process all are known whatever it says.

    Returns:
        A `Result`.

    Raises:
        InputError: something cannot be used (a sentence says what, and what to do).
        Diverged: the iterates blew up; its `result` holds everything up to the last finite iteration.
        RunError: something else came to grief, such as a client or a callback, or `keep=` found no finite value; `result`
            holds what there is.
    """
    run = Run(
        problem=problem, data=data, algorithm=algorithm, x=x, y=y, iterations=iterations, rounds=rounds, key=key,
        engine=engine, callbacks=callbacks, metrics=metrics, evaluate_every=evaluate_every, keep=keep, resume=resume,
        sane=check, client_metrics=client_metrics, share_metrics=share_metrics,
    )  # fmt: skip
    return run.go()


def estimate_hypergradient(
    problem: Problem,
    data: FederatedData,
    algorithm: Algorithm,
    x: PyTree,
    y: PyTree,
    *,
    key: KeyLike,
    engine: Engine | None = None,
) -> tuple[PyTree, PyTree]:
    """The algorithm's estimate of the hypergradient at x, starting its lower level at y.

    For a loop with an outer optimiser of your own, bind `estimator` once instead.

    Returns:
        (h, y_N): the estimate, like x, and the lower variable after the algorithm's rounds. LFedNest's estimate is the
        mean of its clients' local ones.

    Raises:
        InputError: as `solve`, or the algorithm has no estimator.
        Diverged: the estimate is not finite.
    """
    check_kinds(problem, data, algorithm)
    key = check_key(key)
    return Estimator(problem, data, algorithm, x, y, engine)(x, y, key)
