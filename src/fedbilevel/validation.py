"""`validation_loss`: f(x, y) averaged over the federation, by one exchange at a row of the history.

x and y go to all clients, and each says one number, the outer loss over its rows; where the outer loss is one of means
(`Problem(outer_means=...)`), its own means, of whose mean F is taken here. It is a server program of its own
beside the run's, so that every engine has it as it has algorithms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from .algorithm import Algorithm, State
from .best import goal
from .compiled import CHEAPLY, run
from .data import FederatedData
from .engines.base import Execution
from .federation import Client, Federation
from .metrics import Metric, validation_loss
from .problem import Problem
from .protocol.table import Protocol

NAME = validation_loss.__name__  # what it is called where `keep=` alone asks for it
KEY = 2**32 - 2  # no iteration has this number: what drops out here has nothing to do with the run's own draws


def asked(keep: str | None, metrics: Mapping[str, Metric], others: Iterable[str] = ()) -> dict[str, Metric]:
    """The metrics of a run, with `validation_loss` where `keep=` names it and nothing else is called so.

    Args:
        others: the names of what the algorithm tells of an iteration.
    """
    wanted = keep is not None and goal(keep).metric == NAME and NAME not in {*metrics, *others}
    return {**metrics, NAME: validation_loss} if wanted else dict(metrics)


def judged(metrics: Mapping[str, Metric]) -> list[str]:
    """Which of the metrics are the federation's loss, by name."""
    return [name for name, metric in metrics.items() if metric is validation_loss]


class Validation(Algorithm):
    """The server program: it asks everybody, whatever the cohort, and the mean is that of the clients' weights."""

    def step(self, fed: Federation, state: State) -> tuple[State, dict[str, PyTree]]:
        """The state as it is, and the loss there, or the means that it is made of."""
        everyone = fed.draw_cohort(fed.clients)
        return state, {NAME: fed.average(self.validation_loss, state.x, state.y, cohort=everyone)}

    def validation_loss(self, client: Client, x: PyTree, y: PyTree) -> PyTree:
        """f_i(x, y) over all of the client's outer rows; or its means, where the outer loss is one of means."""
        problem = client.problem
        return (problem.outer_value if problem.outer_means is None else problem.means)(x, y, client.outer)


class Judged(NamedTuple):
    """A measurement.

    Attributes:
        value: the loss; not finite where x or y is not.
        rounds, bytes_down, bytes_up: what it took.
    """

    value: float
    rounds: int
    bytes_down: int
    bytes_up: int


class Judge:
    """Measures the loss beside a run: bound, traced and compiled once.

    Args:
        execution: the run's.
        x, y: like those that will be measured (floating-point arrays).
        data: the run's, as it was given.

    Attributes:
        protocol: the `Protocol` of one measurement.
    """

    protocol: Protocol

    def __init__(self, execution: Execution, x: PyTree, y: PyTree, data: FederatedData):
        self._beside = execution
        key = jax.random.fold_in(execution.key, np.uint32(KEY))
        self._execution = execution.another(Validation(), State(x, y), data, key)
        self.protocol = self._execution.protocol

    def __call__(self, x: PyTree, y: PyTree, iteration: int) -> Judged:
        """The loss at x and y after so many iterations.

        Raises:
            RunError: too few clients answered, or one failed.
        """
        self._execution.follow(self._beside.way)
        start = self._execution.start(Validation(), State(x, y))
        start = dataclasses.replace(start, iteration=iteration)
        _, record = self._execution.advance(Validation(), start, 1, np.inf)
        spent = (record.rounds[0], record.bytes_down[0], record.bytes_up[0]) if record.done else record.spent
        found = jax.tree.map(lambda leaf: leaf[-1], record.info[NAME])
        problem = self._execution.problem
        value = found if problem.outer_means is None else run(_value_of, problem, None, found, options=CHEAPLY)
        return Judged(float(value), *spent)


def _value_of(problem: Problem, _: None, *means: PyTree) -> Float[Array, ""]:
    return problem.value_of(*means)
