"""What an engine promises to `solve`: to advance an algorithm by some iterations, and to say what it exchanged."""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Key, PyTree

from ..algorithm import Algorithm
from ..data import FederatedData
from ..errors import InputError
from ..federation import Federation
from ..given import Whole
from ..pace.curvature import Curvature
from ..problem import Problem
from ..processes import ALONE
from ..protocol import step as iteration
from ..protocol import trace
from ..protocol.sites import Path
from ..protocol.table import Protocol, bytes_of
from ..watch import Seen

Program: TypeAlias = Callable[[Algorithm, Federation, PyTree], tuple[PyTree, PyTree]]  # (state) -> (the next, info)
Pass: TypeAlias = Callable[
    [PyTree, Key[Array, ""]], tuple[PyTree, Bool[Array, ""]]
]  # (the state after it, whether finite)


@dataclasses.dataclass(frozen=True)
class Carry:
    """Where a run stands: the server's state, the clients' states (or None), and the iterations done."""

    state: PyTree
    client_state: PyTree
    iteration: int


@dataclasses.dataclass(frozen=True)
class Record:
    """What the iterations of one `advance` did.

    Attributes:
        done: how many iterations ended well; fewer than asked for if one blew up.
        rounds, bytes_down, bytes_up: (done,) of each iteration, Python integers.
        info: the algorithm's diagnostics, each leaf (done + blown up, ...).
        finite: False if the iteration after the last good one blew up (the carry then holds its state).
        seconds: wall-clock time, without compilation.
        last: where it blew up, the carry after the last good iteration, if the engine has kept it.
        seen: what was seen of the server's state, leaves as those of `info`; None if no iteration was run.
        spent: (rounds, bytes down, bytes up) of the iteration that blew up.
    """

    done: int
    rounds: list[int]
    bytes_down: list[int]
    bytes_up: list[int]
    info: PyTree
    finite: bool
    seconds: float
    last: Carry | None = None
    seen: Seen | None = None
    spent: tuple[int, int, int] = (0, 0, 0)


class Execution(abc.ABC):
    """An engine bound to a problem, data, the structure of an algorithm, and a key."""

    longest: int | None = None  # the most iterations between two looks at a run
    replays = True  # whether a stretch can be repeated with other settings, to find out what blew up
    holds_clients = True  # whether the clients' states are in this process
    traceable = False  # whether a pass (`once`) can be part of a program that JAX traces
    way: str = "full"  # how its programs are compiled: "full", or "quick"
    heavy = False  # whether clients' states are so large that to copy them for a stretch takes long
    processes = ALONE  # over which it runs

    def __init__(
        self,
        engine: Engine,
        problem: Problem,
        data: FederatedData,
        key: Key[Array, ""],
        protocol: Protocol,
        program: Program,
    ):
        self.engine, self.problem, self.data, self.key = engine, problem, data, key
        self.protocol, self.program = protocol, program

    @abc.abstractmethod
    def start(self, algorithm: Algorithm, state: PyTree) -> Carry:
        """The carry before the first iteration."""

    def follow(self, way: str) -> None:
        """Be compiled as the run was that is gone on with, where the engine's settings leave that open."""
        return None

    def prepare(self, algorithm: Algorithm, carry: Carry, iterations: int, limit: float) -> None:
        """Hear that about so many iterations follow from `carry`: an engine may choose how to compile them."""
        return None

    @abc.abstractmethod
    def advance(self, algorithm: Algorithm, carry: Carry, iterations: int, limit: float) -> tuple[Carry, Record]:
        """Run `iterations` more, or until a number in the state exceeds `limit` or is not finite."""

    def once(self, algorithm: Algorithm, state: PyTree) -> Pass:
        """A single iteration from the start, ready to be called often: (state, key) -> (the state after it, finite).

        It remembers nothing. `finite` says whether all numbers are, before and after.

        Args:
            state: like those that it will be called with.
        """

        def run(state: PyTree, key: Key[Array, ""]) -> tuple[PyTree, Bool[Array, ""]]:
            if not (fine := all_finite(state)):
                return state, fine
            fresh = self.anew(key)
            carry, _ = fresh.advance(algorithm, fresh.start(algorithm, state), 1, np.inf)
            return carry.state, all_finite(carry.state)

        return run

    def anew(self, key: Key[Array, ""]) -> Execution:
        """The same with another key, as if it had not run."""
        fresh = copy.copy(self)
        fresh.key = key
        return fresh

    def another(self, algorithm: Algorithm, state: PyTree, data: FederatedData, key: Key[Array, ""]) -> Execution:
        """The same clients for another algorithm, which runs beside this one.

        Args:
            state: its first.
            data: this one's, as it was given to `Engine.bind`.
        """
        return self.engine.bind(self.problem, data, algorithm, state, key)

    def taking_over(
        self, before: Execution, carry: Carry, algorithm: Algorithm, state: PyTree, own: Callable[[PyTree], PyTree]
    ) -> Carry:
        """Where this one goes on from a carry of another one of the same clients.

        Args:
            state: the server's, as this one's algorithm has it.
            own: what of another one's client state a client keeps.

        Raises:
            InputError: the clients' states are not in this process.
        """
        raise InputError(f"{type(self.engine).__name__} cannot go on from another algorithm's clients.")

    def race(self, left: tuple[int, ...]) -> None:
        """Hear that what runs is a race of candidates, of whom these are left: clients elsewhere are told."""
        return None

    def begin_again(self, algorithm: Algorithm, state: PyTree) -> Carry:
        """The carry before the first iteration, in the middle of a run: clients have another state then."""
        return self.start(algorithm, state)

    def client_states(self, carry: Carry) -> PyTree:
        """The clients' states, leaves (clients, ...); None if they keep none."""
        return carry.client_state

    def of_clients(self, function: Callable[[PyTree], PyTree], carry: Carry) -> PyTree:
        """A function of each client's state, leaves (clients, ...)."""
        return jax.vmap(function)(self.client_states(carry))

    def write_over(self, carry: Carry) -> None:
        """Hear that the next `advance` is from `carry`, which nobody needs then: a heavy engine may write over it."""
        return None

    def keep(self, carry: Carry) -> None:
        """Hear that the run will not come back to anything before `carry` (an engine may then forget it)."""
        return None

    def ledger(self, counts: Mapping[Path, ArrayLike], done: int) -> tuple[list[int], list[int], list[int]]:
        """(rounds, bytes down, bytes up) per iteration from the counts per site.

        These are (iterations, 1 + flags), or where clients drop out (iterations, 2, 1 + flags), the second of replies.
        """
        rounds, down, up = (np.zeros(done, object) for _ in range(3))
        for path, site in self.protocol.sites.items():
            count, replies = np.asarray(counts[path])[:done], None
            if count.ndim == 3:
                count, replies = count[:, 0], count[:, 1]
            site_down, site_up = bytes_of(site, count, replies)
            rounds = rounds + site.round * count[:, 0].astype(object)
            down, up = down + site_down, up + site_up
        return list(rounds), list(down), list(up)


class Engine(abc.ABC):
    """How a server program is run. `cohort` is how many clients one exchange asks (None: all).

    Attributes:
        name: on the command line, of an engine that ships with the library; such a one can be made of `cohort` alone.
        use: what such a one is for.
    """

    name: ClassVar[str]
    use: ClassVar[str]

    cohort: Whole | None

    @abc.abstractmethod
    def bind(
        self,
        problem: Problem,
        data: FederatedData,
        algorithm: Algorithm,
        state: PyTree,
        key: Key[Array, ""],
        program: Program = iteration,
    ) -> Execution:
        """Check everything, trace the protocol, and get ready to run `program(algorithm, fed, state)`."""


def plan(
    engine: Engine,
    problem: Problem,
    data: FederatedData,
    algorithm: Algorithm,
    state: PyTree,
    cohort: int,
    program: Program,
) -> Protocol:
    """The protocol of a program on an engine (shared by the engines' `bind`)."""
    return trace(algorithm, problem, data, state, cohort, program)


def within(state: PyTree, info: PyTree, limit: Float[Array, ""]) -> Bool[Array, ""]:
    """Whether the state stays within the limit and the diagnostics are finite (NaN fails both)."""
    inexact = lambda tree: [leaf for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)]
    of_curvature = lambda part: isinstance(part, Curvature)  # the sizes of which are the user's
    bounded = jax.tree.map(lambda part: None if of_curvature(part) else part, state, is_leaf=of_curvature)
    small = lambda leaf: jnp.abs(leaf) <= limit.astype(leaf.real.dtype)  # it may be infinite
    fine = [jnp.all(small(leaf)) for leaf in inexact(bounded)]
    return jnp.all(jnp.stack([*fine, *[jnp.all(jnp.isfinite(leaf)) for leaf in inexact((state, info))]]))


def all_finite(state: PyTree) -> Bool[Array, ""]:
    """Whether all floating-point numbers of a state are finite."""
    inexact = [leaf for leaf in jax.tree.leaves(state) if eqx.is_inexact_array(leaf)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in inexact]))
