"""The simulation engine: all clients in one XLA program.

The cohort's client methods are one vmap (or, with `client_batch=`, a loop over smaller ones), rounds and iterations are
compiled loops, and the program runs in chunks of iterations between which progress is shown and metrics are taken.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from ..algorithm import Algorithm
from ..beginning import as_leaves, first_client_state
from ..clock import Stopwatch
from ..cohorts import check_cohort, check_dropout
from ..compiled import Bound, run
from ..data import FederatedData, check_whole
from ..errors import check
from ..given import Whole, whole_number
from ..problem import Problem, strong
from ..processes import Processes, everywhere, here
from ..processes import of as over
from ..program import freeze
from ..protocol import step as iteration
from .base import Carry, Engine, Execution, Pass, Program, Record, plan
from .simulated.books import CAPACITY
from .simulated.federation import Static
from .simulated.programs import Step, chunk, everybodys, many_chunks, once
from .simulated.spread import spread_over


@dataclasses.dataclass(frozen=True)
class Simulation(Engine):
    """Run an algorithm as one XLA program.

    Args:
        cohort: how many clients each exchange asks, drawn anew for every exchange; None for all.
        client_batch: run at most this many clients of the cohort at a time, to bound memory; None for all at once.
        dropout: the probability with which a client that is asked does not answer, in each exchange anew (one always
            does): its reply is missing from the mean, whose weights are scaled to sum to one, and its state stays. Where
            clients' weights differ, that mean is biased towards light ones: of two that count 0.9 and 0.1, the first
            weighs 0.70 on average with a dropout of 0.3.
        mesh: a `jax.make_mesh((devices,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))`: the cohort is
            spread over its first axis, rows too; several processes or hosts after `jax.distributed.initialize()`.
    """

    name: ClassVar[str] = "simulation"
    use: ClassVar[str] = "experiments"

    cohort: Whole | None = None
    client_batch: Whole | None = None
    mesh: jax.sharding.Mesh | None = None
    dropout: float = 0.0

    def __post_init__(self):
        if self.cohort is not None:
            check_cohort(self.cohort, 2**31)
        batch = self.client_batch
        if batch is not None:
            batch = whole_number(batch, 1, "client_batch= is how many clients run at a time, at least 1")
            object.__setattr__(self, "client_batch", batch)
        check_dropout(self.dropout)
        check(
            self.mesh is None or isinstance(self.mesh, jax.sharding.Mesh),
            f"mesh= takes a jax.sharding.Mesh; got {self.mesh!r}.",
        )
        check(
            self.mesh is None or batch is None,
            "mesh= spreads the cohort over devices and client_batch= runs it piecewise: use one.",
        )
        over(self.mesh)

    def bind(
        self,
        problem: Problem,
        data: FederatedData,
        algorithm: Algorithm,
        state: PyTree,
        key: Key[Array, ""],
        program: Program = iteration,
    ) -> _Simulated:
        cohort = check_cohort(self.cohort, data.clients)
        problem = freeze(problem, state.x, state.y, data)
        protocol = plan(self, problem, data, algorithm, state, cohort, program)
        if self.mesh is not None:
            data = spread_over(data, self.mesh)
        else:
            check_whole(data, "Simulation() without mesh=")
        return _Simulated(self, problem, data, key, protocol, program)


class _Simulated(Execution):
    engine: Simulation
    traceable = True

    @functools.cached_property
    def processes(self) -> Processes:  # pyright: ignore[reportIncompatibleVariableOverride]
        return over(self.engine.mesh)

    @functools.cached_property
    def _compiled(self) -> set[Hashable]:
        """The structures of the algorithms that have run."""
        return set()

    def start(self, algorithm: Algorithm, state: PyTree) -> Carry:
        return Carry(strong(state), everybodys(first_client_state(algorithm, state), self.data.clients), 0)

    def advance(self, algorithm: Algorithm, carry: Carry, iterations: int, limit: float) -> tuple[Carry, Record]:
        rounds, down, up, infos, seconds = [], [], [], [], 0.0
        finite, left, spent = True, iterations, (0, 0, 0)
        self._compile(algorithm, carry, limit)
        while left > 0 and finite:
            asked = min(left, CAPACITY)
            watch = Stopwatch()
            (state, client_state), counts, info, done = jax.block_until_ready(self._run(algorithm, carry, asked, limit))
            seconds += self.processes.said(watch.seconds)
            done, left = int(done), left - asked
            finite = done == asked
            carry = Carry(here(state), client_state, carry.iteration + done + (not finite))
            books = self.ledger(counts, done + (not finite))
            for total, new in zip((rounds, down, up), books, strict=True):
                total += new[:done]
            spent = spent if finite else (books[0][done], books[1][done], books[2][done])
            infos.append(jax.tree.map(lambda leaf, n=done + (not finite): np.asarray(leaf)[:n], info))
        info, seen = jax.tree.map(lambda *leaves: np.concatenate(leaves), *infos) if infos else (None, None)
        return carry, Record(len(rounds), rounds, down, up, info, finite, seconds, seen=seen, spent=spent)

    def advance_many(
        self, algorithms: Algorithm, carry: Carry, iterations: int, limit: float
    ) -> tuple[Carry, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """As `advance`, for several algorithms in one program that draw the same cohorts, rows and numbers.

        Args:
            algorithms: an algorithm whose step sizes have a leading axis of `many` values.
            carry: its states (and clients' states) have that axis too.
            iterations: at most the capacity of one chunk, 256.

        Returns:
            (the carry after; rounds, bytes down and up of each, (many, iterations); iterations that ended well, (many,)).
        """
        asked = min(iterations, CAPACITY)
        (state, client_state), counts, _, done = jax.block_until_ready(
            self._run(algorithms, carry, asked, limit, many_chunks)
        )
        ledgers = [self.ledger({path: count[k] for path, count in counts.items()}, asked) for k in range(done.shape[0])]
        rounds, down, up = (np.array([ledger[i] for ledger in ledgers], object) for i in range(3))
        return Carry(state, client_state, carry.iteration + asked), rounds, down, up, np.asarray(done)

    def client_states(self, carry: Carry) -> PyTree:
        return here(carry.client_state)

    def _compile(self, algorithm: Algorithm, carry: Carry, limit: float) -> None:
        """Compile, if need be, so that it is not timed."""
        leaves, structure = jax.tree.flatten(as_leaves(algorithm))
        kind = (
            structure,
            tuple(leaf if isinstance(leaf, str) else (jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves),
        )
        if kind not in self._compiled:
            jax.block_until_ready(self._run(algorithm, carry, 0, limit))  # no iterations
            self._compiled.add(kind)

    def _run(
        self,
        algorithm: Algorithm,
        carry: Carry,
        iterations: int,
        limit: float,
        program: Callable[..., PyTree] | None = None,
    ) -> PyTree:
        count = lambda n: np.asarray(n, np.int32)
        mesh, clients = self.engine.mesh, carry.client_state
        if mesh is not None and self.processes.count > 1:
            clients = everywhere(clients, mesh)
        return run(
            program or chunk, self.problem, as_leaves(algorithm), self._static(), self.data,
            (carry.state, clients), self.key, count(carry.iteration), count(iterations),
            np.asarray(limit, jnp.result_type(float)), np.asarray(self.engine.dropout, np.float32),
        )  # fmt: skip

    def _static(self) -> Static:
        layout = tuple(sorted((path, site.flags) for path, site in self.protocol.sites.items()))
        engine = self.engine
        batch = None if engine.client_batch is None else int(engine.client_batch)
        rounds = tuple(sorted(path for path, site in self.protocol.sites.items() if site.round))
        return Static(self.program, self.protocol.cohort, batch, engine.mesh, layout, engine.dropout > 0, rounds)

    def step(self) -> Step:
        """One iteration as a function of JAX."""
        return Step(self.problem, self.data, jnp.asarray(self.engine.dropout, jnp.float32), self._static())

    def once(self, algorithm: Algorithm, state: PyTree) -> Pass:
        common = self._static(), self.data, jnp.asarray(self.engine.dropout, jnp.float32)
        ready = Bound(once, self.problem, as_leaves(algorithm)).given(*common)
        stay, go = jnp.asarray(False), jnp.asarray(True)
        jax.block_until_ready(ready(stay, strong(state), self.key))  # compiled now: what losses read now counts
        return lambda state, key: here(ready(go, state, key))
