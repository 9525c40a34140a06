"""Single iterations of an algorithm as a function of JAX: for loops of one's own, and many settings or keys side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Int, PyTree

from .algorithm import Algorithm
from .beginning import as_leaves, first_state
from .cohorts import check_cohort
from .data import FederatedData
from .engines.base import Program
from .engines.simulated.programs import Step
from .engines.simulation import Simulation
from .errors import check
from .keys import KeyLike, one_key, threefry
from .problem import Problem, bind
from .protocol import check_kinds, running
from .protocol import step as iteration
from .variables import trainable

Count: TypeAlias = Int[Array, ""]


class Standing(NamedTuple):
    """Where a run stands between two iterations.

    Attributes:
        state: the server's, with x and y (floating-point arrays alone) among its parts.
        clients: the clients' states, leaves (clients, ...); None if they keep none.
    """

    state: PyTree
    clients: PyTree


def stepper(
    problem: Problem,
    data: FederatedData,
    algorithm: Algorithm,
    x: PyTree,
    y: PyTree,
    *,
    engine: Simulation | None = None,
    program: Program = iteration,
) -> Stepper:
    """An algorithm's iterations, ready for loops of one's own: `at, rounds = stepper(at, k, key)`, from `stepper.start`.

    With k = 0, 1, 2, ... and one key it does what `solve` does with that key, within jax.jit, jax.lax.scan and jax.vmap too,
    but for what stands around iterations there: no look at the problem, no history, no end where a run blows up.

    Args:
        problem, data, algorithm: what to run, on which data, how.
        x, y: where to start, as `solve` takes them.
        engine: `Simulation(...)`; the default asks all clients.
        program: (algorithm, fed, state) -> (the next state, anything), in place of the algorithm's `step`.

    Raises:
        InputError: as `solve`, or the engine is another one.
    """
    check_kinds(problem, data, algorithm)
    check(
        engine is None or isinstance(engine, Simulation),
        f"a stepper runs within JAX's programs: engine is Simulation(...); got {engine!r}.",
    )
    x, x_rest = trainable(x, "x")
    y, y_rest = trainable(y, "y")
    whole = bind(problem, x_rest, y_rest)
    algorithm = running(algorithm, whole, data, x, y, check_cohort(getattr(engine, "cohort", None), data.clients))
    state = first_state(algorithm, x, y)
    bound = (engine or Simulation()).bind(whole, data, algorithm, state, jax.random.key(0), program)
    carry = bound.start(algorithm, state)
    start = Standing(carry.state, carry.client_state)
    return Stepper(bound.step(), as_leaves(algorithm), start)


class Stepper:
    """What `fedbilevel.stepper` gives.

    What the losses read (a global, a closure's variable, an array) counts as it is when it is made.

    Attributes:
        algorithm: its numbers are arrays (), so that `jax.vmap` can have many of each.
        start: where a run stands before its first iteration.
    """

    algorithm: Algorithm
    start: Standing

    def __init__(self, step: Step, algorithm: Algorithm, start: Standing):
        self._step, self.algorithm, self.start = step, algorithm, start

    def __call__(
        self, at: Standing, k: ArrayLike, key: KeyLike, algorithm: Algorithm | None = None
    ) -> tuple[Standing, Count]:
        """One iteration.

        Args:
            at: where the run stands.
            k: the number of the iteration, () int, from 0 on: it decides what is drawn.
            key: of the run, a `jax.random.key` (or `jax.random.PRNGKey`).
            algorithm: like `stepper.algorithm`, with other numbers; None: that one.

        Returns:
            (where the run stands after it, the rounds that it took, () int32).
        """
        algorithm = self.algorithm if algorithm is None else algorithm
        place = jnp.asarray(k, jnp.int32)
        states, rounds = self._step(as_leaves(algorithm), (at.state, at.clients), place, threefry(one_key(key)))
        return Standing(*states), rounds

    def compiled(self, function: Callable[..., PyTree], *args: PyTree) -> PyTree:
        """`function(stepper, *args)` as one program, which is compiled once for all steppers that compute the same.

        So a loop over problems that differ in their rows alone, or over starts, compiles nothing again.

        Args:
            function: of a module; it takes a stepper like this one and returns a pytree of arrays.
            args: pytrees; leaves that are no arrays are constants of the program, and must be hashable.
        """
        return self._step.compiled(_within, function, self.algorithm, self.start, args)


def _within(
    step: Step,
    function: Callable[..., PyTree],
    algorithm: Algorithm,
    start: Standing,
    args: tuple[PyTree, ...],
) -> PyTree:
    return function(Stepper(step, algorithm, start), *args)
