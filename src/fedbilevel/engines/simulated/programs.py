"""What the simulation compiles: stretches of iterations, one or many side by side; a first one; single ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from ... import owned
from ...algorithm import Algorithm, State
from ...beginning import client_state
from ...compiled import run
from ...data import FederatedData
from ...jaxprs import Tracer
from ...problem import Problem, strong
from ...watch import observe
from ..base import all_finite, within
from .books import CAPACITY, Books
from .draws import draw
from .federation import SimulatedFederation, Static
from .windows import Highs, Window, bounds, highest, opens

States: TypeAlias = tuple[PyTree, PyTree]  # the server's, the clients'
_Loop: TypeAlias = tuple[
    Int[Array, ""], Bool[Array, ""], States, Highs, dict[str, Array]
]  # how many are done, ended well; ...


def chunk(
    problem: Problem,
    algorithm: Algorithm,
    static: Static,
    data: FederatedData,
    states: States,
    key: Key[Array, ""],
    first: Int[Array, ""],
    iterations: Int[Array, ""],
    limit: Float[Array, ""],
    dropout: Float[Array, ""],
) -> tuple[States, dict[str, Array], Int[Array, ""]]:
    """Up to `iterations` iterations, counted from `first`; stops after one that blows up.

    Returns:
        (the states after; the books of the iterations, see `books`; how many ended well).
    """

    windowed = opens(static.asked, algorithm, states[0], data.clients)

    @jax.jit  # traced once, for the buffers' shapes and for the loop
    def one(k: Int[Array, ""], states: States, highs: Highs) -> tuple[States, Highs, PyTree, tuple[PyTree, PyTree]]:
        own, before, window = jax.random.fold_in(key, first + k), states[0], None
        if windowed:
            draws = draw(own, static.exchanges, data.clients, static.cohort, data.weights)
            window = Window.of(draws, data.clients)
            before = window.cut(before)
        fed = SimulatedFederation(static, problem, data, algorithm, own, before, states[1], dropout, window)
        state, info = static.program(algorithm, fed, before)
        if window is None:
            return (state, fed.client_state), highs, fed.counts, (info, observe(before, state))
        whole, highs = window.put_back(state, states[0], highs)
        seen = window.seen(before, state, bounds(state, highs))
        return (whole, fed.client_state), highs, fed.counts, (info, seen)

    highs = highest(states[0]) if windowed else ()
    books = Books(eqx.filter_eval_shape(one, first, states, highs)[2:])
    buffers = {kind: jnp.zeros((CAPACITY, size), kind) for kind, size in books.sizes.items()}

    def going(loop: _Loop) -> Bool[Array, ""]:
        k, fine, *_ = loop
        return (k < iterations) & fine

    def body(loop: _Loop) -> _Loop:
        k, _, states, highs, buffers = loop
        states, highs, *out = one(k, states, highs)
        write = lambda b, new: jax.lax.dynamic_update_index_in_dim(b, new, k, 0, allow_negative_indices=False)
        buffers = jax.tree.map(write, buffers, books.packed(tuple(out)))
        small = bounds(states[0], highs) if windowed else states[0]
        return k + 1, within(small, out[1][0], limit), states, highs, buffers

    start = (jnp.zeros((), jnp.int32), jnp.asarray(True), states, highs, buffers)
    k, fine, states, _, buffers = jax.lax.while_loop(going, body, start)
    return states, buffers, jnp.where(fine, k, k - 1)


def many_chunks(
    problem: Problem,
    algorithms: Algorithm,
    static: Static,
    data: FederatedData,
    states: States,
    key: Key[Array, ""],
    first: Int[Array, ""],
    iterations: Int[Array, ""],
    limit: Float[Array, ""],
    dropout: Float[Array, ""],
) -> tuple[States, dict[str, Array], Int[Array, " many"]]:
    """`chunk` over a leading axis of the algorithm's leaves and of the states; what is drawn is common to all."""
    run = lambda algorithm, states: chunk(
        problem, algorithm, static, data, states, key, first, iterations, limit, dropout
    )
    return eqx.filter_vmap(run)(algorithms, states)


def once(
    problem: Problem,
    algorithm: Algorithm,
    static: Static,
    data: FederatedData,
    dropout: Float[Array, ""],
    go: Bool[Array, ""],
    state: PyTree,
    key: Key[Array, ""],
) -> tuple[PyTree, Bool[Array, ""]]:
    """(The state after a first iteration, whether all numbers are finite, before and after); as it is unless `go`."""

    def run(state: PyTree) -> PyTree:
        states = state, begun(algorithm, state, data.clients)
        own = jax.random.fold_in(key, 0)
        fed = SimulatedFederation(static, problem, data, algorithm, own, *states, dropout=dropout)
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
    static: Static

    def __call__(
        self, algorithm: Algorithm, states: States, k: Int[Array, ""], key: Key[Array, ""]
    ) -> tuple[States, Int[Array, ""]]:
        return run(one_step, self.problem, algorithm, self.static, self.data, states, k, key, self.dropout)

    def compiled(self, function: Callable[..., PyTree], *args: PyTree) -> PyTree:
        """`function(step, *args)` as one program, which is kept for steps whose problems compute the same."""
        return run(_held, self.problem, None, function, self.static, self.data, self.dropout, args)


def one_step(
    problem: Problem,
    algorithm: Algorithm,
    static: Static,
    data: FederatedData,
    states: States,
    k: Int[Array, ""],
    key: Key[Array, ""],
    dropout: Float[Array, ""],
) -> tuple[States, Int[Array, ""]]:
    own = jax.random.fold_in(key, k)
    fed = SimulatedFederation(static, problem, data, algorithm, own, *states, dropout=dropout)
    state, _ = static.program(algorithm, fed, states[0])
    counts = fed.counts or {}
    asked = [counts[path].reshape(-1)[0] for path in static.rounds]
    return (state, fed.client_state), sum(asked, jnp.zeros((), jnp.int32))


def _held(
    problem: Problem,
    _: None,
    function: Callable[..., PyTree],
    static: Static,
    data: FederatedData,
    dropout: Float[Array, ""],
    args: tuple[PyTree, ...],
) -> PyTree:
    return function(Step(problem, data, dropout, static), *args)


def begun(algorithm: Algorithm, state: PyTree, clients: int) -> PyTree:
    """The clients' first states, leaves (clients, ...), within a program."""
    if not owned.nodes((state.x, state.y)):
        return everybodys(client_state(algorithm, state), clients)
    one = lambda client: client_state(algorithm, State(*owned.own((state.x, state.y), client)))
    return jax.vmap(one)(jnp.arange(clients, dtype=jnp.int32))


def everybodys(one: PyTree, clients: int) -> PyTree:
    """The clients' states, leaves (clients, ...), from the one that all start with."""

    def everyone(leaf: Array) -> Array:
        shape = clients, *leaf.shape
        if isinstance(leaf, Tracer):
            return jnp.broadcast_to(leaf, shape)
        return jax.device_put(np.broadcast_to(np.asarray(leaf), shape))  # outside programs: it compiles nothing

    return jax.tree.map(everyone, one)
