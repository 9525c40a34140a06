"""The loopback engine: one client after the other, with real bytes in between.

Also the debug engine. Each client holds its own rows only, sees a message only after it has been written to bytes and
read back, and answers in bytes; the replies are shuffled on their way and put in order by client. A client method that
fails is reported with the client, the method and the shapes it was sent.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from .. import owned
from ..algorithm import Algorithm
from ..cohorts import check_cohort, check_dropout
from ..data import ClientRows, FederatedData, check_whole
from ..given import Whole
from ..problem import Problem, strong
from ..program import freeze
from ..protocol import as_leaves, client_state
from ..protocol import step as iteration
from .base import Carry, Engine, Execution, Program, Record, plan
from .faults import Faults, Roster
from .messaging.client_side import ClientSide, Methods, first_held
from .messaging.server_side import Messaging
from .messaging.transport import Answers, Purpose, Request, Transport, as_tag


@dataclasses.dataclass(frozen=True)
class Loopback(Engine):
    """Run an algorithm client by client, in this process.

    Args:
        cohort: how many clients each exchange asks; None for all.
        jit: compile the client methods; False runs them line by line, for a debugger or `print`.
        shuffle: seed of the order in which clients are asked and replies arrive (it must not matter).
        dropout: the probability with which a client's answer goes missing, as in `Simulation(dropout=)`, and with the
            same bias where clients' weights differ.
        faults: what to do when a client fails; by default the run ends with its error.
    """

    name: ClassVar[str] = "loopback"
    use: ClassVar[str] = "debugging: a failure names the client, the method and the shapes"

    cohort: Whole | None = None
    jit: bool = True
    shuffle: int = 0
    dropout: float = 0.0
    faults: Faults | None = None

    def __post_init__(self):
        if self.cohort is not None:
            check_cohort(self.cohort, 2**31)
        check_dropout(self.dropout)

    def bind(
        self,
        problem: Problem,
        data: FederatedData,
        algorithm: Algorithm,
        state: PyTree,
        key: Key[Array, ""],
        program: Program = iteration,
    ) -> _Looped:
        check_whole(data, "Loopback()")
        cohort = check_cohort(self.cohort, data.clients)
        problem, data = problem.holding(data)
        problem = freeze(problem, state.x, state.y, data)
        protocol = plan(self, problem, data, algorithm, state, cohort, program)
        return _Looped(
            self, problem, data, key, protocol, program,
            transport=InProcess(self.shuffle), faults=self.faults, dropout=self.dropout,
        )  # fmt: skip


class _Looped(Messaging):
    """Its carry holds the clients' states themselves, so that any carry can be gone on from."""

    engine: Loopback
    transport: InProcess
    holds_clients = True

    @functools.cached_property
    def methods(self) -> Methods:
        """Runs the client methods."""
        return Methods(self.engine.jit)

    @functools.cached_property
    def rows(self) -> list[tuple[ClientRows, ClientRows]]:
        """Each client's own."""
        if self.problem.on_host:  # their numbers alone: windows of one shape, so that one program does for all
            return [(self.data.inner.client(i), self.data.outer.client(i)) for i in range(self.data.clients)]
        return [(self.data.inner.alone(i), self.data.outer.alone(i)) for i in range(self.data.clients)]

    def start(self, algorithm: Algorithm, state: PyTree) -> Carry:
        clients = range(self.data.clients)
        if owned.nodes((state.x, state.y)):
            own = [first_held(algorithm, self.protocol, state, i) for i in clients]
        else:
            own = [client_state(algorithm, state)] * len(clients)
        return Carry(strong(state), None if own[0] is None else own, 0)

    def advance(self, algorithm: Algorithm, carry: Carry, iterations: int, limit: float) -> tuple[Carry, Record]:
        leaves, states = as_leaves(algorithm), carry.client_state or [None] * self.data.clients
        clients = self.transport.members = [
            ClientSide(self.problem, rows, leaves, self.protocol, self.key, i, state, self.methods, name)
            for i, (rows, state, name) in enumerate(zip(self.rows, states, self.data.names, strict=True))
        ]
        self.transport.first = lambda x, y: strong(algorithm.client_init(x, y))
        self.kept = self.first_tags()

        def holding(carry: Carry) -> Carry:
            both = zip(clients, carry.client_state, strict=True)
            held = [client.states[as_tag(tag)] for client, tag in both if client.keeps]
            if self.protocol.at_sites is not None and carry.iteration > before:  # the blocks are in this process too
                blocks = [client.blocks(own, carry.iteration) for client, own in zip(clients, held, strict=True)]
                state = owned.keeping(carry.state, [jnp.stack(each) for each in zip(*blocks, strict=True)])
                carry = dataclasses.replace(carry, state=state)
            return dataclasses.replace(carry, client_state=held or None)

        start, before = dataclasses.replace(carry, client_state=self.first_tags()), carry.iteration
        carry, record = super().advance(algorithm, start, iterations, limit)
        if record.last is not None:
            record = dataclasses.replace(record, last=holding(record.last))
        return holding(carry), record

    def taking_over(
        self, before: Execution, carry: Carry, algorithm: Algorithm, state: PyTree, own: Callable[[PyTree], PyTree]
    ) -> Carry:
        kept = None if carry.client_state is None else [own(each) for each in carry.client_state]
        none = kept is None or not jax.tree.leaves(kept)
        return Carry(strong(state), None if none else kept, carry.iteration)

    def anew(self, key: Key[Array, ""]) -> _Looped:
        _ = self.methods, self.rows  # what is compiled and cut out serves all
        fresh = copy.copy(self)
        fresh.key, fresh.roster = key, Roster(self.data.clients, self.faults)
        return fresh

    def client_states(self, carry: Carry) -> PyTree:
        states = carry.client_state
        if self.protocol.at_sites is not None and states is not None:
            states = [held.own for held in states]
            return None if not jax.tree.leaves(states) else jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        return None if states is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


class InProcess(Transport):
    """Clients in this process, asked one after the other in an order that is shuffled."""

    def __init__(self, shuffle: int):
        self.members: list[ClientSide] = []
        self.order = np.random.default_rng(shuffle)
        self.first: Callable[[PyTree, PyTree], PyTree] = lambda x, y: None

    def ask(self, requests: dict[int, Request], deadline: float | None) -> Answers:
        answers = Answers()
        for client in self.order.permutation(list(requests)):
            try:
                answers.replies[int(client)] = self.members[client].answer(requests[int(client)])
            except Exception as error:  # whatever the client's method raises; the server's policy says what follows
                answers.failures[int(client)] = error
        return answers

    def restart(self, x: PyTree, y: PyTree, purpose: Purpose) -> None:
        for index, client in enumerate(self.members):
            client.restart(self.first(*owned.own((x, y), index)))
