"""One run, described once: what tasks, applications, comparisons, studies and the server of a network start."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence

import jax
from jaxtyping import PyTree

from .algorithm import Algorithm
from .by_client import ClientMetrics, Share, checked, measures
from .callbacks.base import Callback
from .callbacks.listeners import listed
from .data import FederatedData
from .engines.base import Engine
from .engines.simulation import Simulation
from .given import Whole
from .keys import KeyLike
from .metrics import Metric
from .problem import Problem
from .protocol import Protocol, protocol
from .result import Result
from .solve import solve
from .tables.prepared import Prepared
from .validation import Validation, asked, judged
from .variables import trainable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """All that one run is: what `fb.solve` takes, and what to call it.

    Args:
        problem, algorithm: the losses, and how to solve them.
        data: the clients' rows; or a loader, () -> them, called when they are needed.
        start: (x, y), where to start; or a function, () -> them.
        key: the run's random key.
        iterations: outer iterations; or instead
        rounds: communication rounds.
        engine: how it is run; None: `Simulation()`.
        metrics: name -> fn(x, y) -> scalar.
        evaluate_every: iterations between rows of the history.
        keep: by what the best x and y are kept, as in "test_loss:min"; None: they are not.
        callbacks: a list of them; or a function, () -> a list, so that each run has fresh ones.
        check: whether the problem is looked at first, as by `solve(check=)`.
        precision: 32 or 64 bits; None: as the process is set.
        name: what it is called in progress.
        client_metrics, share_metrics: how each client fares, and what of it travels, as `solve` takes them.
    """

    problem: Problem
    algorithm: Algorithm
    data: FederatedData | Callable[[], FederatedData]
    start: tuple[PyTree, PyTree] | Callable[[], tuple[PyTree, PyTree]]
    key: KeyLike
    iterations: Whole | None = None
    rounds: Whole | None = None
    engine: Engine | None = None
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    evaluate_every: Whole = 1
    keep: str | None = None
    callbacks: Sequence[Callback] | Callable[[], Sequence[Callback]] = ()
    check: bool = True
    precision: int | None = None
    name: str = "run"
    client_metrics: ClientMetrics = dataclasses.field(default_factory=dict)
    share_metrics: Share = "mean"

    def run(self, *, callbacks: Sequence[Callback] = (), resume: str | os.PathLike[str] | None = None) -> Result:
        """Run it.

        Args:
            callbacks: more of them, heard before its own.
            resume: a folder with a checkpoint of this very run, to go on from.

        Raises:
            InputError, Diverged, RunError: as `solve`.
        """
        own = listed(self.callbacks, "callbacks=")
        with self.bits():
            data, (x, y) = self.rows(), self.begin()
            return solve(
                self.problem, data, self.algorithm, x, y, self.iterations, rounds=self.rounds, key=self.key,
                engine=self.engine, callbacks=[*callbacks, *own], metrics=self.metrics,
                evaluate_every=self.evaluate_every, keep=self.keep, resume=resume, check=self.check,
                client_metrics=self.client_metrics, share_metrics=self.share_metrics,
            )  # fmt: skip

    def protocol(self) -> Protocol:
        """What one of its iterations exchanges, and a row of its history if it does."""
        with self.bits():
            data, (x, y), engine = self.rows(), self.begin(), self.engine or Simulation()
            found = protocol(self.algorithm, self.problem, data, x, y, engine)
            loss, by_client = bool(judged(asked(self.keep, self.metrics))), checked(self.client_metrics)
            if not (loss or by_client):
                return found
            variables, rests = zip(trainable(x, "x"), trainable(y, "y"), strict=True)
            metrics = measures(by_client, self.problem, variables, rests, data)
            program = Validation(loss, metrics, self.share_metrics, data.clients)
            each_row = protocol(program, self.problem, data, x, y, engine).exchanges
            return dataclasses.replace(found, each_row=each_row)

    @property
    def prepared(self) -> Prepared | None:
        """How tables became the clients' rows, if they did, and the rows are not loaded later."""
        return self.data.prepared if isinstance(self.data, FederatedData) else None

    def rows(self) -> FederatedData:
        """The clients' rows."""
        return self.data() if callable(self.data) else self.data

    def begin(self) -> tuple[PyTree, PyTree]:
        """(x, y), where it starts."""
        return self.start() if callable(self.start) else self.start

    def bits(self) -> contextlib.AbstractContextManager:
        """What its arrays are made within, for their precision."""
        return contextlib.nullcontext() if self.precision is None else jax.enable_x64(self.precision == 64)
