"""What a run asks of all clients at a row of the history: `validation_loss`, f(x, y), and how each client fares.

x and y go to all clients, and each says its outer loss, or what of its metrics may leave it, in one exchange. It is a server
program of its own beside the run's, so that every engine has it as it has algorithms. Where the outer loss is one of means
(`Problem(outer_means=...)`) clients say their means, of whose mean F is taken here.

A client keeps its own numbers as a state. So they are known where the clients' states are (Simulation, Loopback), and stay
at the sites where they are not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .algorithm import Algorithm, State, option
from .best import goal
from .by_client import Found, Kept, Measure, Share, at_own_place, numbers, shared
from .compiled import CHEAPLY, run
from .data import FederatedData
from .engines.base import Execution
from .federation import Client, Federation, Reply, Way
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


class Own(eqx.Module):
    """What a client keeps: its numbers, and where it has one its own lower variable."""

    kept: Kept
    y: PyTree = None


class Validation(Algorithm):
    """The server program: it asks everybody, whatever the cohort, and the mean is that of the clients' weights.

    Args:
        loss: whether the outer loss is asked for.
        metrics: the clients' metrics.
        share: what of their numbers leaves the clients: nothing (False), what their mean takes ("mean"), each (True).
        clients: how many there are.
        own: whether each client has a lower variable of its own, in its state.
    """

    loss: bool = option(True)
    metrics: tuple[Measure, ...] = option(())
    share: Share = option("mean")
    clients: int = option(0)
    own: bool = option(False)

    def client_init(self, x: PyTree, y: PyTree) -> Own | None:
        """Nothing is known of the clients yet."""
        return Own(Kept.nothing(len(self.metrics)), y if self.own else None) if self.metrics else None

    def step(self, fed: Federation, state: State) -> tuple[State, dict[str, PyTree]]:
        """The state as it is, and what the clients said there."""
        everyone = fed.draw_cohort(fed.clients)
        if not self.metrics:
            return state, {NAME: fed.average(self.validation_loss, state.x, state.y, cohort=everyone)}
        parts = self._parts
        ways = tuple(parts.values())
        found = fed.average(
            self.client_metrics, state.x, state.y, cohort=everyone, combine=ways[0] if len(ways) == 1 else ways
        )
        return state, dict(zip(parts, found if len(ways) > 1 else (found,), strict=True))

    @property
    def _parts(self) -> dict[str, Way]:
        """What travels up, by name, and how it is combined."""
        found: dict[str, Way] = {NAME: "mean"} if self.loss else {}
        found |= {"sums": "mean"} if self.share else {}
        found |= {"values": "maximum", "status": "maximum"} if self.share is True else {}
        return found or {"done": "maximum"}

    def validation_loss(self, client: Client, x: PyTree, y: PyTree) -> PyTree:
        """f_i(x, y) over all of the client's outer rows; or its means, where the outer loss is one of means."""
        problem = client.problem
        return (problem.outer_value if problem.outer_means is None else problem.means)(x, y, client.outer)

    def client_metrics(self, client: Client, x: PyTree, y: PyTree) -> Reply:
        """How the client fares: it keeps its numbers, and replies with what may leave it, or that it has taken them."""
        lower = client.state.y if self.own else y
        rows = {"inner": lambda: client.inner, "outer": lambda: client.outer}
        kept = numbers([each.sums(client.problem, x, lower, rows[each.level]()) for each in self.metrics])
        said = {"done": lambda: (jnp.ones((), jnp.int8),)}
        said |= {NAME: lambda: (self.validation_loss(client, x, y),), "sums": lambda: (shared(kept),)}
        said |= {"values": lambda: at_own_place(kept, client.index, self.clients), "status": tuple}
        first, *more = (part for name in self._parts for part in said[name]())
        return Reply((first, *more) if more else first, Own(kept, client.state.y))


class Judged(NamedTuple):
    """A measurement.

    Attributes:
        value: the loss; not finite where x or y is not, or where it was not asked for.
        rounds, bytes_down, bytes_up: what it took.
        found: how the clients fare, as far as it is known here.
    """

    value: float
    rounds: int
    bytes_down: int
    bytes_up: int
    found: Found


class Judge:
    """Measures beside a run: bound, traced and compiled once.

    Args:
        execution: the run's.
        x, y: like those that will be measured (floating-point arrays).
        data: the run's, as it was given.
        program: what is measured.

    Attributes:
        protocol: the `Protocol` of one measurement.
        measures: the clients' metrics.
    """

    protocol: Protocol

    def __init__(self, execution: Execution, x: PyTree, y: PyTree, data: FederatedData, program: Validation):
        self._beside, self._program, self._weights = (
            execution,
            program,
            None if data.weights is None else np.asarray(data.weights),
        )
        key = jax.random.fold_in(execution.key, np.uint32(KEY))
        self.measures = program.metrics
        self._execution = execution.another(program, State(x, y), data, key)
        self.protocol = self._execution.protocol

    def __call__(self, x: PyTree, y: PyTree, iteration: int) -> Judged:
        """What holds at x and y after so many iterations.

        Raises:
            RunError: too few clients answered, or one failed.
        """
        program = self._program
        self._execution.follow(self._beside.way)
        start = self._execution.start(program, State(x, y))
        start = dataclasses.replace(start, iteration=iteration)
        carry, record = self._execution.advance(program, start, 1, np.inf)
        spent = (record.rounds[0], record.bytes_down[0], record.bytes_up[0]) if record.done else record.spent
        told = jax.tree.map(lambda value: value[-1], record.info)
        value = self._value(told.get(NAME, np.nan))
        if not program.metrics:
            return Judged(value, *spent, Found())
        each = None
        if self._execution.holds_clients:
            each = self._execution.of_clients(lambda own: own.kept, carry)
        elif program.share is True:
            each = Kept(np.asarray(told["values"]), np.ones_like(told["values"]), np.asarray(told["status"]))
        return Judged(value, *spent, Found.of(told.get("sums"), each, self._weights))

    def _value(self, told: PyTree) -> float:
        """The loss, of what was told of it."""
        problem = self._execution.problem
        if problem.outer_means is None or not self._program.loss:
            return float(told)
        return float(run(_value_of, problem, None, told, options=CHEAPLY))


def _value_of(problem: Problem, _: None, *means: PyTree) -> Float[Array, ""]:
    return problem.value_of(*means)
