"""The estimate of a hypergradient: bound once to a problem, data and an algorithm, and called in loops of one's own."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Array, Key, PyTree

from .algorithm import Algorithm, State
from .beginning import first_state
from .cohorts import check_cohort
from .data import FederatedData
from .diagnosis import of_estimate
from .engines.base import Carry, Engine
from .engines.simulation import Simulation
from .errors import Diverged, check
from .federation import Federation
from .foreign import as_given
from .jaxprs import Tracer
from .keys import KeyLike, one_key, threefry
from .means.carried import measure_steps
from .pace.automatic import found_in, numbered, with_numbers
from .problem import Problem, bind
from .protocol import Protocol, check_kinds, running
from .template import Template
from .variables import trainable


def estimator(
    problem: Problem, data: FederatedData, algorithm: Algorithm, x: PyTree, y: PyTree, *, engine: Engine | None = None
) -> Estimator:
    """The algorithm's estimate of the hypergradient, ready to be called often: `h, y = estimator(x, y, key)`.

    Args:
        problem, data, algorithm: what to estimate, on which data, how.
        x, y: templates: variables of which structure, shapes and dtypes count, as `solve` takes them.
        engine: `Simulation()` (the default), also within jax.jit, jax.lax.scan and jax.vmap; or `Loopback()`.

    Raises:
        InputError: as `solve`, or the algorithm has no estimator.
    """
    return Estimator(problem, data, algorithm, x, y, engine)


class Estimator:
    """What `fedbilevel.estimator` gives: `h, y = estimator(x, y, key)`.

    Everything that can be done once is done when it is made: checks, the protocol, and in simulation the compilation. What
    the losses read (a global, a closure's variable, an array) counts as it is then; with `Loopback` as it is when a client's
    method first runs, and with `Loopback(jit=False)` as it is at each call. It keeps nothing of a call.

    Attributes:
        protocol: what one call exchanges: its rounds and bytes.
        algorithm: whose estimate it is; steps that are "auto" were measured when it was made, at the templates.
    """

    protocol: Protocol
    algorithm: Algorithm

    def __init__(
        self, problem: Problem, data: FederatedData, algorithm: Algorithm, x: PyTree, y: PyTree, engine: Engine | None
    ):
        check_kinds(problem, data, algorithm)
        check(
            engine is None or isinstance(engine, Engine), f"engine is Simulation(...) or Loopback(...); got {engine!r}."
        )
        x, x_rest = trainable(x, "x")
        y, y_rest = trainable(y, "y")
        engine, bound, state = engine or Simulation(), bind(problem, x_rest, y_rest), State(x, y)
        self._marks = x_rest, y_rest
        cohort = check_cohort(engine.cohort, data.clients)
        self.algorithm = _measured(running(algorithm, bound, data, x, y, cohort), engine, bound, data, state)
        runs = running(self.algorithm, bound, data, x, y, cohort, estimate)
        self._execution = engine.bind(bound, data, runs, state, jax.random.key(0), estimate)
        self.protocol = self._execution.protocol
        self._runs, self._once = runs, self._execution.once(runs, state)
        self._x, self._y = Template(x, x_rest, "x", "the estimator"), Template(y, y_rest, "y", "the estimator")

    def __call__(self, x: PyTree, y: PyTree, key: KeyLike) -> tuple[PyTree, PyTree]:
        """The estimate at x, starting the lower level at y.

        Within jax.jit, jax.lax.scan and jax.vmap values cannot be looked at: there numbers that are not finite are
        returned as they are. Elsewhere one flag is waited for.

        Args:
            x, y: like the templates, or their floating-point arrays alone (the rest None, as `eqx.filter` leaves it).
            key: a `jax.random.key` (or `jax.random.PRNGKey`); the same key gives the same estimate on every engine.

        Returns:
            (h, y_N): the estimate, like x's floating-point arrays, and the lower variable after the algorithm's rounds, like
            the y that was given. LFedNest's estimate is the mean of its clients' local ones.

        Raises:
            InputError: x or y does not look like its template, or is not finite; the key is none; or the engine cannot run
                within JAX's transformations.
            Diverged: the estimate is not finite.
        """
        (x, _), (y, rest) = self._x.split(x), self._y.split(y)
        state, key = State(x, y), threefry(one_key(key))
        if not self._execution.traceable:
            self._check_outside(state, key)
        after, finite = self._once(state, key)
        if not isinstance(finite, Tracer) and not finite:
            self._fail(state, after, key)
        return as_given(after.x, self._marks[0]), as_given(self._y.join(after.y, rest), self._marks[1])

    def _check_outside(self, state: State, key: Key[Array, ""]) -> None:
        """Refuse to run within a program that JAX is tracing."""
        there = jax.lax.add(np.float32(0), np.float32(0))  # a tracer wherever JAX traces
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((state, key, there)))
        name = type(self._execution.engine).__name__
        check(
            not traced,
            f"{name} sends messages one by one, and cannot run within jax.jit, jax.lax.scan, jax.grad or jax.vmap: call the "
            "estimator outside, or bind it with engine=fedbilevel.Simulation().",
        )

    def _fail(self, state: State, after: State, key: Key[Array, ""]) -> None:
        """Say what is not finite."""
        self._x.check_finite(state.x)
        self._y.check_finite(state.y)
        execution = self._execution.anew(key)
        raise Diverged(of_estimate(execution, self._runs, Carry(state, None, 0), Carry(after, None, 1)))


def _measured(algorithm: Algorithm, engine: Engine, problem: Problem, data: FederatedData, at: State) -> Algorithm:
    """The algorithm with numbers for all its steps, those that are "auto" found once, at the templates."""
    if not found_in(algorithm):
        return numbered(algorithm)
    first = first_state(algorithm, at.x, at.y)
    execution = engine.bind(problem, data, algorithm, first, jax.random.key(0), measure_steps)
    _, record = execution.advance(algorithm, execution.start(algorithm, first), 1, np.inf)
    return with_numbers(algorithm, {name: float(value[-1]) for name, value in record.info.items()})


def estimate(algorithm: Algorithm, fed: Federation, state: PyTree) -> tuple[State, tuple[()]]:
    """The program of an estimator: the estimate takes the place of x."""
    h, y = algorithm.estimate(fed, state.x, state.y)
    return State(h, y), ()
