"""The simulation engine: all clients in one XLA program.

The cohort's client methods are one vmap (or, with `client_batch=`, a loop over smaller ones), rounds and iterations are
compiled loops, and the program runs in chunks of iterations between which progress is shown and metrics are taken.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import ClassVar, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from ..algorithm import Algorithm
from ..clock import Stopwatch
from ..cohorts import answered, check_cohort, check_dropout, client_key, combine_replies, full_weights, stays
from ..compiled import Bound, run
from ..data import FederatedData, entry
from ..errors import check
from ..federation import Client, Combine, Flag, Reply
from ..given import Whole, whole_number
from ..problem import Problem, strong
from ..program import freeze
from ..protocol import as_leaves, client_state
from ..protocol import step as iteration
from ..protocol.sites import Path
from ..protocol.traced import TracedFederation
from ..watch import observe
from .base import Carry, Engine, Execution, Pass, Program, Record, all_finite, plan, within

_CAPACITY = 256  # the most iterations of one compiled chunk: bounds its buffers of diagnostics


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
            data = _spread(data, self.mesh)
        return _Simulated(self, problem, data, key, protocol, program)


class _Simulated(Execution):
    engine: Simulation
    traceable = True

    @functools.cached_property
    def _compiled(self) -> set[Hashable]:
        """The structures of the algorithms that have run."""
        return set()

    def start(self, algorithm: Algorithm, state: PyTree) -> Carry:
        return Carry(strong(state), _everybodys(client_state(algorithm, state), self.data.clients), 0)

    def advance(self, algorithm: Algorithm, carry: Carry, iterations: int, limit: float) -> tuple[Carry, Record]:
        rounds, down, up, infos, seconds = [], [], [], [], 0.0
        finite, left, spent = True, iterations, (0, 0, 0)
        self._compile(algorithm, carry, limit)
        while left > 0 and finite:
            asked = min(left, _CAPACITY)
            watch = Stopwatch()
            (state, client_state), counts, info, done = jax.block_until_ready(self._run(algorithm, carry, asked, limit))
            seconds += watch.seconds()
            done, left = int(done), left - asked
            finite = done == asked
            carry = Carry(state, client_state, carry.iteration + done + (not finite))
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
        asked = min(iterations, _CAPACITY)
        (state, client_state), counts, _, done = jax.block_until_ready(
            self._run(algorithms, carry, asked, limit, _many_chunks)
        )
        ledgers = [self.ledger({path: count[k] for path, count in counts.items()}, asked) for k in range(done.shape[0])]
        rounds, down, up = (np.array([ledger[i] for ledger in ledgers], object) for i in range(3))
        return Carry(state, client_state, carry.iteration + asked), rounds, down, up, np.asarray(done)

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
        count = lambda n: jnp.asarray(n, jnp.int32)
        return run(
            program or _chunk, self.problem, as_leaves(algorithm), self._static(), self.data,
            (carry.state, carry.client_state), self.key, count(carry.iteration), count(iterations),
            jnp.asarray(limit, jnp.result_type(float)), jnp.asarray(self.engine.dropout, jnp.float32),
        )  # fmt: skip

    def _static(self) -> _Static:
        layout = tuple(sorted((path, site.flags) for path, site in self.protocol.sites.items()))
        engine = self.engine
        batch = None if engine.client_batch is None else int(engine.client_batch)
        rounds = tuple(sorted(path for path, site in self.protocol.sites.items() if site.round))
        return _Static(self.program, self.protocol.cohort, batch, engine.mesh, layout, engine.dropout > 0, rounds)

    def step(self) -> Step:
        """One iteration as a function of JAX."""
        return Step(self.problem, self.data, jnp.asarray(self.engine.dropout, jnp.float32), self._static())

    def once(self, algorithm: Algorithm, state: PyTree) -> Pass:
        common = self._static(), self.data, jnp.asarray(self.engine.dropout, jnp.float32)
        ready = Bound(_once, self.problem, as_leaves(algorithm)).given(*common)
        stay, go = jnp.asarray(False), jnp.asarray(True)
        jax.block_until_ready(ready(stay, strong(state), self.key))  # compiled now: what losses read now counts
        return lambda state, key: ready(go, state, key)


@dataclasses.dataclass(frozen=True)
class _Static:
    program: Program
    cohort: int
    client_batch: int | None
    mesh: jax.sharding.Mesh | None
    layout: tuple[tuple[Path, int], ...]
    drops: bool = False
    rounds: tuple[Path, ...] = ()  # the exchanges that are rounds of their own


_States: TypeAlias = tuple[PyTree, PyTree]  # the server's, the clients'
_Loop: TypeAlias = tuple[
    Int[Array, ""], Bool[Array, ""], _States, dict[str, Array]
]  # how many are done, ended well; ...


def _chunk(
    problem: Problem,
    algorithm: Algorithm,
    static: _Static,
    data: FederatedData,
    states: _States,
    key: Key[Array, ""],
    first: Int[Array, ""],
    iterations: Int[Array, ""],
    limit: Float[Array, ""],
    dropout: Float[Array, ""],
) -> tuple[_States, PyTree, PyTree, Int[Array, ""]]:
    """Up to `iterations` iterations, counted from `first`; stops after one that blows up."""

    @jax.jit  # traced once, for the buffers' shapes and for the loop
    def one(k: Int[Array, ""], states: _States) -> tuple[_States, PyTree, tuple[PyTree, PyTree]]:
        fed = _SimulatedFederation(
            static, problem, data, algorithm, jax.random.fold_in(key, first + k), *states, dropout=dropout
        )
        state, info = static.program(algorithm, fed, states[0])
        return (state, fed.client_state), fed.counts, (info, observe(states[0], state))

    books = _Books(eqx.filter_eval_shape(one, first, states)[1:])
    buffers = {kind: jnp.zeros((_CAPACITY, size), kind) for kind, size in books.sizes.items()}

    def going(loop: _Loop) -> Bool[Array, ""]:
        k, fine, _, _ = loop
        return (k < iterations) & fine

    def body(loop: _Loop) -> _Loop:
        k, _, states, buffers = loop
        states, *out = one(k, states)
        write = lambda b, new: jax.lax.dynamic_update_index_in_dim(b, new, k, 0, allow_negative_indices=False)
        buffers = jax.tree.map(write, buffers, books.packed(tuple(out)))
        return k + 1, within(states[0], out[1][0], limit), states, buffers

    start = (jnp.zeros((), jnp.int32), jnp.asarray(True), states, buffers)
    k, fine, states, buffers = jax.lax.while_loop(going, body, start)
    counts, info = books.unpacked(buffers)
    return states, counts, info, jnp.where(fine, k, k - 1)


def _once(
    problem: Problem,
    algorithm: Algorithm,
    static: _Static,
    data: FederatedData,
    dropout: Float[Array, ""],
    go: Bool[Array, ""],
    state: PyTree,
    key: Key[Array, ""],
) -> tuple[PyTree, Bool[Array, ""]]:
    """(The state after a first iteration, whether all numbers are finite, before and after); as it is unless `go`."""

    def run(state: PyTree) -> PyTree:
        states = state, _everybodys(client_state(algorithm, state), data.clients)
        own = jax.random.fold_in(key, 0)
        fed = _SimulatedFederation(static, problem, data, algorithm, own, *states, dropout=dropout)
        return strong(static.program(algorithm, fed, state)[0])

    after = jax.lax.cond(go, run, lambda state: state, state)
    return after, all_finite(state) & all_finite(after)


@dataclasses.dataclass(frozen=True)
class Step:
    """One iteration as a function of JAX, for loops of whoever holds it: (states, rounds) = step(algorithm, states, k, key).

    `states` are the server's and the clients'; `algorithm` has arrays where it has numbers (`protocol.as_leaves`).
    """

    problem: Problem
    data: FederatedData
    dropout: Float[Array, ""]
    static: _Static

    def __call__(
        self, algorithm: Algorithm, states: _States, k: Int[Array, ""], key: Key[Array, ""]
    ) -> tuple[_States, Int[Array, ""]]:
        return run(_step, self.problem, algorithm, self.static, self.data, states, k, key, self.dropout)

    def compiled(self, function: Callable[..., PyTree], *args: PyTree) -> PyTree:
        """`function(step, *args)` as one program, which is kept for steps whose problems compute the same."""
        return run(_held, self.problem, None, function, self.static, self.data, self.dropout, args)


def _step(
    problem: Problem,
    algorithm: Algorithm,
    static: _Static,
    data: FederatedData,
    states: _States,
    k: Int[Array, ""],
    key: Key[Array, ""],
    dropout: Float[Array, ""],
) -> tuple[_States, Int[Array, ""]]:
    own = jax.random.fold_in(key, k)
    fed = _SimulatedFederation(static, problem, data, algorithm, own, *states, dropout=dropout)
    state, _ = static.program(algorithm, fed, states[0])
    counts = fed.counts or {}
    asked = [counts[path].reshape(-1)[0] for path in static.rounds]
    return (state, fed.client_state), sum(asked, jnp.zeros((), jnp.int32))


def _held(
    problem: Problem,
    _: None,
    function: Callable[..., PyTree],
    static: _Static,
    data: FederatedData,
    dropout: Float[Array, ""],
    args: tuple[PyTree, ...],
) -> PyTree:
    return function(Step(problem, data, dropout, static), *args)


def _everybodys(one: PyTree, clients: int) -> PyTree:
    """The clients' states, leaves (clients, ...), from the one that all start with."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (clients, *leaf.shape)), one)


class _Books:
    """What an iteration leaves behind, some dozens of numbers, as one row of a buffer for each dtype: a loop over dozens of
    buffers takes longer to compile.

    Attributes:
        sizes: by dtype, how many numbers.
    """

    def __init__(self, shapes: PyTree):
        self._leaves, self._structure = jax.tree.flatten(shapes)
        self.sizes: dict[str, int] = {}
        self._places: list[tuple[str, int]] = []
        for leaf in self._leaves:
            kind = str(leaf.dtype)
            start = self.sizes.get(kind, 0)
            self.sizes[kind] = start + leaf.size
            self._places.append((kind, start))

    def packed(self, tree: PyTree) -> dict[str, Array]:
        """The rows of one iteration."""
        parts: dict[str, list] = {kind: [] for kind in self.sizes}
        for leaf, (kind, _) in zip(jax.tree.leaves(tree), self._places, strict=True):
            parts[kind].append(jax.lax.reshape(leaf, (leaf.size,)))
        return {kind: jax.lax.concatenate(leaves, 0) for kind, leaves in parts.items()}

    def unpacked(self, buffers: dict[str, Array]) -> PyTree:
        """Of buffers of such rows, the tree with a leading axis."""
        cut = lambda leaf, kind, start: jax.lax.reshape(
            jax.lax.slice_in_dim(buffers[kind], start, start + leaf.size, axis=1), (_CAPACITY, *leaf.shape)
        )
        leaves = [cut(leaf, *place) for leaf, place in zip(self._leaves, self._places, strict=True)]
        return jax.tree.unflatten(self._structure, leaves)


def _many_chunks(
    problem: Problem,
    algorithms: Algorithm,
    static: _Static,
    data: FederatedData,
    states: _States,
    key: Key[Array, ""],
    first: Int[Array, ""],
    iterations: Int[Array, ""],
    limit: Float[Array, ""],
    dropout: Float[Array, ""],
) -> tuple[_States, PyTree, PyTree, Int[Array, " many"]]:
    """`_chunk` over a leading axis of the algorithm's leaves and of the states; what is drawn is common to all."""
    run = lambda algorithm, states: _chunk(
        problem, algorithm, static, data, states, key, first, iterations, limit, dropout
    )
    return eqx.filter_vmap(run)(algorithms, states)


class _SimulatedFederation(TracedFederation):
    """`fed` inside the simulated program: an exchange is a vmap of the client method over the cohort.

    Where exchanges ask the same clients (everyone, or a cohort that the program drew for them), the features of their
    rows at the iteration's x are computed once, before any loop; what no exchange uses, the compiler drops. Not so on a
    mesh, nor with `client_batch`, which bounds the memory that they would take: then once in each exchange.
    """

    def __init__(
        self,
        static: _Static,
        problem: Problem,
        data: FederatedData,
        algorithm: Algorithm,
        key: Key[Array, ""],
        state: PyTree,
        client_state: PyTree,
        dropout: float | Float[Array, ""] = 0.0,
    ):
        self.drops, self._dropout = static.drops, dropout
        super().__init__(algorithm, data.clients, static.cohort, data.weights, key, dict(static.layout))
        self._static, self._problem, self._data, self._x = static, problem, data, state.x
        self.client_state = client_state
        self._known: list[tuple[Int[Array, " cohort"], PyTree]] = []  # (cohort, features of its clients' inner rows)
        if static.cohort == data.clients:
            self._remember(jnp.arange(data.clients, dtype=jnp.int32))

    def draw_cohort(self, size: int | None = None) -> Int[Array, " cohort"]:
        cohort = super().draw_cohort(size)
        self._remember(cohort)
        return cohort

    def _remember(self, cohort: Int[Array, " cohort"]) -> None:
        batch = self._static.client_batch
        at_once = self._static.mesh is None and (batch is None or batch >= cohort.shape[0])
        if self._problem.features is not None and at_once:
            features = lambda i: self._data.inner.client(i).with_features(self._problem, self._x).features
            self._known.append((cohort, jax.vmap(features)(cohort)))

    def exchange(
        self,
        name: str,
        method: Callable[..., PyTree],
        message: PyTree,
        combine: Combine,
        wanted: tuple[Flag, ...],
        key: Key[Array, ""],
        cohort: Int[Array, " cohort"] | None,
    ) -> tuple[PyTree, PyTree]:
        if cohort is None and self._static.cohort == self.clients and self._known:
            cohort = self._known[0][0]
        index = self.sample(key) if cohort is None else cohort
        features = next((phi for known, phi in self._known if known is index), None)
        size, slots = index.shape[0], index.shape[0]
        if self._static.mesh is not None:  # pad to whole devices; the extra slots' replies are cut off again
            devices = self._static.mesh.devices.shape[0]
            slots = -(-size // devices) * devices
            index = jnp.concatenate([index, jnp.broadcast_to(index[-1:], (slots - size,))])
            index = jax.lax.with_sharding_constraint(index, _by_client(self._static.mesh))
        flags = tuple(jnp.asarray(flag, bool) for flag in wanted)
        present = None
        if self.drops:
            present = stays(key, index[:size], self._dropout)
            self._replied = jnp.sum(present, dtype=jnp.int32)
            self._share = answered(self._data.weights, index[:size], present, self.clients)

        def one(slot: tuple[Int[Array, ""], PyTree]) -> tuple[PyTree, PyTree]:
            i, phi = slot
            inner, outer = self._data.inner.client(i), self._data.outer.client(i)
            if phi is not None:
                inner = dataclasses.replace(inner, features=phi, at=self._x)
            state = jax.tree.map(lambda leaf: entry(leaf, i), self.client_state)
            client = Client(self._problem, (inner, outer), state, client_key(key, i), flags, i)
            out = self.replied(name, method, client, message)
            return (out.reply, out.state) if isinstance(out, Reply) else (out, None)

        batch = self._static.client_batch
        if batch is None or batch >= slots:
            replies, states = jax.vmap(one)((index, features))
        else:
            replies, states = jax.lax.map(one, (index, features), batch_size=batch)
        if slots > size:
            replies, states, index = jax.tree.map(lambda leaf: leaf[:size], (replies, states, index))
        if states is not None:
            to = index if present is None else jnp.where(present, index, self.clients)  # out of range: dropped
            put = lambda all, new: all.at[to].set(new.astype(all.dtype), mode="drop")
            self.client_state = jax.tree.map(put, self.client_state, states)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), replies)
        return shapes, combine_replies(combine, replies, full_weights(self._data.weights, index, self.clients), present)


def _by_client(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names[0]))


def _spread(data: FederatedData, mesh: jax.sharding.Mesh) -> FederatedData:
    """Rows over the devices, padded to as many for each; what describes them stays everywhere."""
    devices = mesh.devices.shape[0]

    def spread(leaf: np.ndarray | Array) -> Array:
        short = -leaf.shape[0] % devices
        padded = np.concatenate([leaf, np.zeros((short, *leaf.shape[1:]), leaf.dtype)]) if short else leaf
        return jax.device_put(padded, _by_client(mesh))

    rows = lambda d: (d.inner.rows, d.outer.rows)
    return eqx.tree_at(rows, data, jax.tree.map(spread, rows(data)))
