"""The simulation engine: all clients in one XLA program.

The cohort's client methods are one vmap (or, with `client_batch=`, a loop over smaller ones), rounds and iterations are
compiled loops, and the program runs in chunks of iterations between which progress is shown and metrics are taken.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Hashable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from .. import owned
from ..algorithm import Algorithm, State
from ..beginning import as_leaves, first_client_state
from ..clock import Stopwatch
from ..cohorts import check_cohort, check_dropout
from ..compiled import Bound, Options, run
from ..component import title_of
from ..data import FederatedData, check_whole
from ..errors import check
from ..given import Whole, whole_number
from ..memory import seldom_collecting
from ..problem import Problem, strong
from ..processes import Processes, everywhere, here
from ..processes import of as over
from ..program import compiled_as, freeze
from ..protocol import step as iteration
from .base import Carry, Engine, Execution, Pass, Program, Record, plan
from .simulated.books import CAPACITY, Books, expected
from .simulated.compiling import QUICK, Ahead, check_way, chosen, open_to_choice
from .simulated.draws import fits
from .simulated.federation import Static
from .simulated.on_disk import Store, Version
from .simulated.programs import Step, begun, chunk, everybodys, many_chunks, once
from .simulated.room import IN_MEMORY, check_place, room
from .simulated.spread import spread_over

LARGE = 2**24  # bytes of clients' states from which on they are written in place from chunk to chunk


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
        mesh: the devices to spread clients and rows over: `fedbilevel.processes.join()` gives those of this process, or of
            all that were started together, on one machine or several (see "Several machines"); as does
            `jax.make_mesh((devices,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))`. An exchange with everybody
            is computed where the rows lie; a cohort is dealt out evenly, and its rows travel. The numbers are those of one
            device, to rounding. Of several processes all have to call `solve`, and all get the result; callbacks and
            metrics are called in process 0 alone.
        compile: "quick": in a sixth of the time, for iterations that take 2.5 to 3.3 times as long (on a CPU); "full": as
            fast as it gets; "auto": whichever is done sooner, by the number of iterations and the measured cost of one,
            and "full" in 64 bits, over several processes and on other devices. It is chosen once, at the start of a run,
            and part of what makes it itself: the two differ in float32's last places. A problem in PyTorch is compiled
            quickly in 64 bits too: XLA has little to compute there.
        client_state: where the states lie that clients keep (control variates): "memory", or "disk" for a file in the
            folder of temporary files, or a folder for it. The numbers are the same. In memory all clients' states are
            held several times while an iteration runs; on disk those of a cohort.
    """

    name: ClassVar[str] = "simulation"
    use: ClassVar[str] = "experiments"

    cohort: Whole | None = None
    client_batch: Whole | None = None
    mesh: jax.sharding.Mesh | None = None
    dropout: float = 0.0
    compile: str = "auto"
    client_state: str | os.PathLike[str] = IN_MEMORY

    def __post_init__(self):
        if self.cohort is not None:
            check_cohort(self.cohort, 2**31)
        batch = self.client_batch
        if batch is not None:
            batch = whole_number(batch, 1, "client_batch= is how many clients run at a time, at least 1")
            object.__setattr__(self, "client_batch", batch)
        check_dropout(self.dropout)
        check_way(self.compile)
        check(
            self.mesh is None or isinstance(self.mesh, jax.sharding.Mesh),
            f"mesh= takes a jax.sharding.Mesh; got {self.mesh!r}.",
        )
        check(
            self.mesh is None or batch is None,
            "mesh= spreads the cohort over devices and client_batch= runs it piecewise: use one.",
        )
        over(self.mesh)
        check_place(self.client_state)
        check(
            self.client_state == IN_MEMORY or self.mesh is None,
            f"client_state={self.client_state!r} keeps clients' states in a file, which devices of a mesh cannot share: "
            "leave client_state= or mesh= out.",
        )

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
        check(
            not problem.on_host or self.mesh is None or self.mesh.size == 1,
            f"a {type(problem).__module__.rpartition('.')[0]}.{type(problem).__name__} is computed by this process, not on "
            "the devices of a mesh: leave mesh= out.",
        )
        problem, data = problem.holding(data)
        problem = freeze(problem, state.x, state.y, data)
        protocol = plan(self, problem, data, algorithm, state, cohort, program)
        if self.mesh is not None:
            data = spread_over(data, self.mesh)
        else:
            check_whole(data, "Simulation() without mesh=")
        return _Simulated(self, problem, data, key, protocol, program)


def _large(clients: PyTree) -> bool:
    """Whether clients' states are so large that another copy of them takes longer than to say so."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(clients)) >= LARGE


def _copied(leaf: Array) -> Array:
    return jax.device_put(leaf, may_alias=False)


class _Simulated(Execution):
    engine: Simulation
    traceable = True

    @functools.cached_property
    def processes(self) -> Processes:  # pyright: ignore[reportIncompatibleVariableOverride]
        return over(self.engine.mesh)

    _chosen: str | None = None  # how the run is compiled, once that is chosen
    _ahead: Ahead | None = None  # what was run to choose it
    _where: Books | None = None  # what lies where in the books of iterations
    _over: Carry | None = None  # what the next stretch may write over

    @property
    def way(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        asked = self.engine.compile
        return (self._chosen or "full") if asked == "auto" else asked

    def another(self, algorithm: Algorithm, state: PyTree, data: FederatedData, key: Key[Array, ""]) -> _Simulated:
        engine = dataclasses.replace(
            self.engine, client_state=IN_MEMORY
        )  # what runs beside keeps little, and not for long
        protocol = plan(engine, self.problem, data, algorithm, state, self.protocol.cohort, iteration)
        return _Simulated(engine, self.problem, self.data, key, protocol, iteration)  # rows lie where they lay

    def follow(self, way: str) -> None:
        self._chosen = way

    def prepare(self, algorithm: Algorithm, carry: Carry, iterations: int, limit: float) -> None:
        if self.engine.compile != "auto" or self._chosen is not None:
            return
        self._chosen = "full"
        on_host = self.problem.on_host
        if open_to_choice(self.processes.count, on_host):
            self._chosen = "quick"
            shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((self.data, carry.state))]
            kind = self._kind(algorithm), compiled_as(self.problem), self._static(), tuple(shapes)
            self._chosen = chosen(iterations, kind, lambda: self._pace(algorithm, carry, limit), on_host)
        if self._chosen == "full":
            self._ahead = None
            self._ready.clear()

    def _pace(self, algorithm: Algorithm, carry: Carry, limit: float) -> float:
        """Seconds of the first iteration, whose outcome is kept for `advance` (not so where it changes a file)."""
        if isinstance(carry.client_state, Version):
            at = lambda kept: dataclasses.replace(carry, client_state=kept)
            return carry.client_state.changed(lambda kept: self._pace(algorithm, at(kept), limit))[1]
        self._compile(algorithm, carry, limit)
        watch = Stopwatch()
        out = jax.block_until_ready(self._run(algorithm, carry, 1, limit))
        self._ahead = Ahead(algorithm, carry, limit, out, watch.seconds())
        return self._ahead.seconds

    @functools.cached_property
    def _ready(self) -> set[Hashable]:
        """The structures of the algorithms that have run."""
        return set()

    def start(self, algorithm: Algorithm, state: PyTree) -> Carry:
        one, clients = first_client_state(algorithm, state), self.data.clients
        place = room(self.engine.client_state, title_of(algorithm), one, clients, self.protocol.cohort)
        kept = everybodys(one, clients) if place is None else Version(Store(place, one, clients))
        if jax.tree.leaves(one) and owned.nodes((state.x, state.y)):  # clients begin with blocks of their own
            each = eqx.filter_jit(begun)(as_leaves(algorithm), State(state.x, state.y), clients)
            kept = kept.restored(list(map(np.asarray, jax.tree.leaves(each)))) if isinstance(kept, Version) else each
        self.heavy = place is None and self.engine.mesh is None and _large(kept)
        return Carry(strong(state), kept, 0)

    def taking_over(
        self, before: Execution, carry: Carry, algorithm: Algorithm, state: PyTree, own: Callable[[PyTree], PyTree]
    ) -> Carry:
        start = self.start(algorithm, state)
        kept = before.of_clients(own, carry) if jax.tree.leaves(carry.client_state) else start.client_state
        if isinstance(start.client_state, Version):
            kept = start.client_state.restored([np.asarray(leaf) for leaf in jax.tree.leaves(kept)])
        return Carry(start.state, kept, carry.iteration)

    def write_over(self, carry: Carry) -> None:
        self._over = carry

    def advance(self, algorithm: Algorithm, carry: Carry, iterations: int, limit: float) -> tuple[Carry, Record]:
        if not isinstance(carry.client_state, Version):
            return self._advance(algorithm, carry, iterations, limit)
        go = lambda kept: self._advance(algorithm, dataclasses.replace(carry, client_state=kept), iterations, limit)
        after, (there, record) = carry.client_state.changed(go)
        return dataclasses.replace(there, client_state=after), record

    def _advance(self, algorithm: Algorithm, carry: Carry, iterations: int, limit: float) -> tuple[Carry, Record]:
        rounds, down, up, infos, seconds = [], [], [], [], 0.0
        finite, left, spent = True, iterations, (0, 0, 0)
        ours, self._over = carry is self._over, None
        self._compile(algorithm, carry, limit)
        while left > 0 and finite:
            asked, out, took = self._stretch(algorithm, carry, min(left, CAPACITY), limit, spend=ours or bool(infos))
            (state, client_state), buffers, done = out
            counts, info = self._books(state).unpacked(buffers)
            seconds += took
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

    def _stretch(
        self, algorithm: Algorithm, carry: Carry, iterations: int, limit: float, spend: bool
    ) -> tuple[int, PyTree, float]:
        """(How many iterations were run, what the program gave, seconds): the first one may have been run already.

        Args:
            spend: whether nobody else needs the carry.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.of(algorithm, carry, limit):
            return 1, ahead.out, ahead.seconds
        watch = Stopwatch()
        out = jax.block_until_ready(self._run(algorithm, carry, iterations, limit, spend=spend))
        return iterations, out, self.processes.said(watch.seconds)

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
        self._in_memory("several runs in one program")
        (state, client_state), buffers, done = jax.block_until_ready(
            self._run(algorithms, carry, asked, limit, many_chunks)
        )
        counts, _ = self._books(jax.tree.map(lambda leaf: leaf[0], state)).unpacked(buffers)
        ledgers = [self.ledger({path: count[k] for path, count in counts.items()}, asked) for k in range(done.shape[0])]
        rounds, down, up = (np.array([ledger[i] for ledger in ledgers], object) for i in range(3))
        return Carry(state, client_state, carry.iteration + asked), rounds, down, up, np.asarray(done)

    def client_states(self, carry: Carry) -> PyTree:
        kept = carry.client_state
        return kept.whole() if isinstance(kept, Version) else here(kept)

    def of_clients(self, function: Callable[[PyTree], PyTree], carry: Carry) -> PyTree:
        kept = carry.client_state
        return kept.each(function) if isinstance(kept, Version) else super().of_clients(function, carry)

    def _compile(self, algorithm: Algorithm, carry: Carry, limit: float) -> None:
        """Compile, if need be, so that it is not timed."""
        kind = self._kind(algorithm)
        if kind not in self._ready:
            with seldom_collecting():
                jax.block_until_ready(self._run(algorithm, carry, 0, limit))  # no iterations
            self._ready.add(kind)

    @staticmethod
    def _kind(algorithm: Algorithm) -> Hashable:
        """What of an algorithm its program depends on."""
        leaves, structure = jax.tree.flatten(as_leaves(algorithm))
        typed = lambda leaf: leaf if isinstance(leaf, str) else (jnp.shape(leaf), jnp.result_type(leaf))
        return structure, tuple(map(typed, leaves))

    def _run(
        self,
        algorithm: Algorithm,
        carry: Carry,
        iterations: int,
        limit: float,
        program: Callable[..., PyTree] | None = None,
        spend: bool = False,
    ) -> PyTree:
        count = lambda n: np.asarray(n, np.int32)
        mesh, clients, spent = self.engine.mesh, carry.client_state, None
        if mesh is not None and self.processes.count > 1:
            clients = everywhere(clients, mesh)
        elif mesh is None and program is None and _large(clients):  # written in place, in a copy where need be
            spent = clients = clients if spend else jax.tree.map(_copied, clients)
        return run(
            program or chunk, self.problem, as_leaves(algorithm), self._static(), self.data,
            (carry.state, clients), self.key, count(carry.iteration), count(iterations),
            np.asarray(limit, jnp.result_type(float)), np.asarray(self.engine.dropout, np.float32),
            options=self._options, spent=spent,
        )  # fmt: skip

    def _books(self, state: PyTree) -> Books:
        """Where the books of iterations say what; they look the same for the whole run."""
        if self._where is None:
            static = self._static()
            self._where = expected(static.layout, static.drops, self.protocol.info, state)
        return self._where

    @property
    def _options(self) -> Options:
        return QUICK if self.way == "quick" else ()

    def _static(self) -> Static:
        layout = tuple(sorted((path, site.flags) for path, site in self.protocol.sites.items()))
        engine = self.engine
        batch = None if engine.client_batch is None else int(engine.client_batch)
        rounds = tuple(sorted(path for path, site in self.protocol.sites.items() if site.round))
        exchanges = self.protocol.taken_most or 0
        exchanges = exchanges if fits(exchanges, self.protocol.cohort) else 0
        drops = engine.dropout > 0
        cohort = self.protocol.cohort
        usual = self.program is iteration and all(site.cohort == cohort for site in self.protocol.sites.values())
        return Static(self.program, cohort, batch, engine.mesh, layout, drops, rounds, exchanges, usual)

    def _in_memory(self, what: str) -> None:
        given = self.engine.client_state
        check(given == IN_MEMORY, f"{what} keep clients' states in memory: leave client_state={given!r} out.")

    def step(self) -> Step:
        """One iteration as a function of JAX."""
        self._in_memory("iterations within a program of your own")
        return Step(self.problem, self.data, jnp.asarray(self.engine.dropout, jnp.float32), self._static())

    def once(self, algorithm: Algorithm, state: PyTree) -> Pass:
        common = self._static(), self.data, jnp.asarray(self.engine.dropout, jnp.float32)
        ready = Bound(once, self.problem, as_leaves(algorithm), self._options).given(*common)
        stay, go = jnp.asarray(False), jnp.asarray(True)
        jax.block_until_ready(ready(stay, strong(state), self.key))  # compiled now: what losses read now counts
        return lambda state, key: here(ready(go, state, key))
