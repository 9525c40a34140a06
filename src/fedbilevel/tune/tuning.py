"""`tune`: x without a step size, an algorithm or a search: candidates race in the rounds of one run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import PyTree

from .. import errors
from ..algorithm import Algorithm
from ..algorithms.lockstep import Lockstep
from ..best import goal
from ..by_client import ClientMetrics, Share
from ..callbacks.base import Callback
from ..data import FederatedData
from ..diagnosis.still import LEAST, never_moved
from ..engines.base import Engine
from ..engines.simulation import Simulation
from ..given import Whole, whole_number
from ..keys import KeyLike
from ..metrics import Metric, measured, validation_loss
from ..pace.automatic import STEPS, Auto
from ..problem import Problem
from ..protocol import check_kinds
from ..race.heats import Candidate, Heats, Judge, heats_of
from ..race.racing import Race
from ..result import History, Result
from ..run import Run
from ..validation import NAME as VALIDATION
from ..variables import trainable
from .entrants import MOST, lineup, starting

if TYPE_CHECKING:
    import pandas


@dataclasses.dataclass
class Tuned(Result):
    """What `tune` returns: a `Result` of the whole run, of whichever candidate led, and who took part.

    Attributes:
        algorithm: the one that won, with the numbers that it took last.
        candidates: all that raced, in their order at the start: name, algorithm, tempo, score (f at x with y where it should
            be, or the metric, as it was judged last; NaN where it never was, or blew up), round (after which it was
            dropped; None for the winner), why.
    """

    algorithm: Algorithm = dataclasses.field(kw_only=True)
    candidates: list[Candidate] = dataclasses.field(kw_only=True)

    @property
    def rounds(self) -> int:
        """Communication rounds in all: of the race, of judging, of the winner."""
        return int(self.history[-1]["rounds"])

    @property
    def bytes_down(self) -> int:
        """Payload from the server in all, in bytes, over all clients and candidates."""
        return int(self.history[-1]["bytes_down"])

    @property
    def bytes_up(self) -> int:
        """Payload to the server in all."""
        return int(self.history[-1]["bytes_up"])

    @property
    def table(self) -> pandas.DataFrame:
        """The candidates, a row each."""
        import pandas

        return pandas.DataFrame([dataclasses.asdict(each) for each in self.candidates])


def tune(
    problem: Problem,
    data: FederatedData,
    x: PyTree,
    y: PyTree,
    *,
    rounds: Whole,
    key: KeyLike,
    engine: Engine | None = None,
    metric: str | None = None,
    direction: str | None = None,
    algorithms: Sequence[Algorithm] | None = None,
    candidates: Whole | None = None,
    batch_size: Whole | None = None,
    max_bytes: Whole | None = None,
    callbacks: Sequence[Callback] = (),
    metrics: Mapping[str, Metric] | None = None,
    evaluate_every: Whole = 1,
    keep: str | None = None,
    resume: str | os.PathLike[str] | None = None,
    check: bool = True,
    client_metrics: ClientMetrics | None = None,
    share_metrics: Share = "mean",
) -> Tuned:
    """Minimise f(x, y*(x)) over x in one federated run, with no step size and no algorithm to choose.

    Candidates share the rounds of the first fifth: what they ask of the clients travels in one message a round. After each
    heat the worse half is dropped, by f at each one's x with y where it should be (`fedbilevel.race.scoring`); the best goes
    on from its state. A round of the race is one round; its bytes are those of all who race.

    Args:
        problem, data: what to tune, on which data.
        x, y: where to start, pytrees of floating-point arrays (equinox modules too).
        rounds: communication rounds in all: racing, measuring and judging are in them.
        key: a `jax.random.key`; the same key gives the same run on every engine.
        engine: `Simulation()` (the default) or `Loopback()`, with their `cohort=`.
        metric: the name of one of `metrics`, by which candidates are judged in place of f; with `direction=`.
            "validation_loss" is f.
        direction: "min" or "max", which of `metric` is the better.
        algorithms: candidates of your own, such as [fb.Lockstep(), fb.AggITD()], with "auto" or numbers; by default
            Lockstep and SimFBO, each with steps of x as they are found and half as long ones. Where clients count
            unequally and a cohort is drawn, SimFBO alone.
        candidates: how many race, the first of those; 1 for no race. By default all, or fewer where the rounds are few.
        batch_size: rows of a minibatch, fresh for every local step; None for all rows. Not with `algorithms=`.
        max_bytes: of payload, down and up, over all clients: the run ends before it exceeds them.
        callbacks, metrics, evaluate_every, keep, resume, check, client_metrics, share_metrics: as `solve` takes them.
            The history's rows are the leader's; its column `candidates` says how many raced.

    Returns:
        A `Tuned`.

    Raises:
        InputError: something cannot be used, or the rounds or bytes are too few for one iteration.
        Diverged: all candidates blew up, and the first one again.
        RunError: as `solve`.
    """
    check_kinds(problem, data, Lockstep())
    budget = whole_number(rounds, 1, "rounds= is a whole number of at least 1")
    purse = None if max_bytes is None else whole_number(max_bytes, 1, "max_bytes= is a whole number of at least 1")
    engine = engine or Simulation()
    errors.check(isinstance(engine, Engine), f"engine is Simulation(...) or Loopback(...); got {engine!r}.")
    metrics = metrics or {}
    judge = _judged_by(metric, direction, metrics)
    inner, _ = trainable(x, "x")
    trainable(y, "y")
    asked = (
        None if candidates is None else whole_number(candidates, 1, f"candidates= is a whole number from 1 to {MOST}")
    )
    entrants, longest = lineup(
        problem, data, x, y, engine, budget, purse, algorithms=algorithms, candidates=asked, batch_size=batch_size
    )
    running, table = starting(entrants, inner)
    heats = (
        Heats(running, table, heats_of(len(entrants), budget, longest), judge) if isinstance(running, Race) else None
    )
    run = Run(
        problem=problem, data=data, algorithm=running, x=x, y=y, rounds=budget, key=key, engine=engine,
        callbacks=callbacks, metrics=metrics, evaluate_every=evaluate_every, keep=keep, resume=resume, sane=check,
        heats=heats, most_bytes=purse, client_metrics=client_metrics, share_metrics=share_metrics,
    )  # fmt: skip
    try:
        tuned = _tuned(run, run.go(), table if heats is None else heats.table)
    except errors.RunError as error:
        if isinstance(error.result, Result):
            error.result = _tuned(run, error.result, table if heats is None else heats.table)
        raise
    if tuned.iteration < LEAST and never_moved(tuned.state):  # of longer runs it is told anyhow
        last = tuned.history[-1]
        if last.get("hypergradient_norm", 1) != 0:
            errors.warn(
                f"x is where it started, after {last['rounds']:g} round{'s' * (last['rounds'] != 1)}: it waits until y has "
                "settled. Give more rounds."
            )
    return tuned


def _judged_by(metric: str | None, direction: str | None, metrics: Mapping[str, Metric]) -> Judge | None:
    """What candidates are judged by; None for f."""
    if metric is None:
        errors.check(direction in (None, "min"), f"direction={direction!r} goes with metric=: f is minimised.")
        return None
    words = f"{metric}:{direction}" if direction is not None else metric
    errors.check(
        isinstance(metric, str) and (direction is None or isinstance(direction, str)) and ":" in words,
        f"metric= names one of metrics=, and direction= says whether it is to fall ('min') or to rise ('max'); got "
        f"metric={metric!r}, direction={direction!r}.",
    )
    wanted = goal(words)
    wanted.known([*metrics, VALIDATION])
    taken = metrics.get(wanted.metric, validation_loss)
    if taken is validation_loss:  # that is f
        errors.check(wanted.direction == "min", f"{wanted.metric} is f, which is minimised: direction='min'.")
        return None
    return Judge(lambda x, y: measured(wanted.metric, taken, x, y), 1 if wanted.direction == "min" else -1)


def _tuned(run: Run, result: Result, table: Sequence[Candidate]) -> Tuned:
    held = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return Tuned(**held, algorithm=_with_numbers(run.running, result.history), candidates=list(table))


def _with_numbers(algorithm: Algorithm, history: History) -> Algorithm:
    """The algorithm with the steps that it took last."""
    if isinstance(algorithm, Race):
        algorithm = algorithm.families[0].one(0)
    plain = lambda leaf: leaf.item() if isinstance(leaf, jax.Array) and leaf.shape == () else leaf
    algorithm = jax.tree.map(plain, algorithm)
    if not isinstance(algorithm, Auto):
        return algorithm
    taken = {}
    for name in algorithm.found:
        values = history.column(name) if name in history.columns else np.zeros(0)
        good = values[np.isfinite(values) & (values > 0)]
        taken[name] = float(good[-1]) if len(good) else STEPS[name]
    return dataclasses.replace(algorithm.algorithm, **taken)
