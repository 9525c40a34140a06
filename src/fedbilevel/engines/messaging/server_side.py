"""The server's half of an engine that sends messages: a `fed` whose exchanges are bytes to clients and bytes back.

The server program runs in Python, round by round, with the random draws of a simulation, so that the numbers are a
simulation's. Where clients fail, those who answered are averaged, their weights scaled to sum to one, or the exchange is
tried again, as the `Faults` policy says.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from ... import owned
from ...algorithm import Algorithm
from ...arrays import on_device
from ...clock import Stopwatch
from ...cohorts import (
    answered,
    check_cohort,
    check_dropout,
    combine_replies,
    exchange_key,
    full_weights,
    sample_cohort,
    stays,
)
from ...data import FederatedData
from ...errors import RunError, check
from ...federation import Cohort, Combine, Federation, Flag, Index
from ...problem import Problem, strong
from ...protocol import as_leaves
from ...protocol.calls import check_carry, check_given, check_times, client_method
from ...protocol.sites import Path, mask_reply, normalise, parts_wanted, reply_parts
from ...protocol.table import Protocol
from ...protocol.traced import Scopes
from ...protocol.wire import decode, encode, message_schema
from ...watch import observe
from ..base import Carry, Engine, Execution, Program, Record, within
from ..faults import REBUILD, Faults, Roster, StateLost, TooFewReplies
from .transport import RUN, START, Answers, Request, Round, Tag, Transport, as_tag, attempt_key

_REBUILDS = 3  # in a row, without an iteration in between: a client that cannot keep its state will not


class Messaging(Execution):
    """An execution that sends messages.

    Args:
        faults: what to do when clients fail; None: the first failure ends the run with its error.
        dropout: the probability with which a client's answer goes missing (a simulation of it).
        watch: hears of every `Round`.
    """

    holds_clients = False
    purpose = RUN

    def __init__(
        self,
        engine: Engine,
        problem: Problem,
        data: FederatedData,
        key: Key[Array, ""],
        protocol: Protocol,
        program: Program,
        *,
        transport: Transport,
        faults: Faults | None,
        dropout: float,
        watch: Callable[[Round], None] | None = None,
    ):
        super().__init__(engine, problem, data, key, protocol, program)
        check_dropout(dropout)
        if faults is not None:
            faults.check_cohort(self.protocol.cohort)
        self.transport, self.faults, self.dropout, self.watch = transport, faults, dropout, watch
        self.places = {path: place for place, path in enumerate(sorted(self.protocol.sites))}
        self.kept = self.first_tags()
        self.roster = Roster(self.data.clients, faults)

    def first_tags(self) -> np.ndarray:
        """(clients, 3) the tags of the states that the clients start with."""
        return np.tile(np.asarray(START, np.int32), (self.data.clients, 1))  # 32 bits: a checkpoint has them

    def start(self, algorithm: Algorithm, state: PyTree) -> Carry:
        return Carry(strong(state), self.first_tags(), 0)

    def keep(self, carry: Carry) -> None:
        self.kept = carry.client_state

    def advance(self, algorithm: Algorithm, carry: Carry, iterations: int, limit: float) -> tuple[Carry, Record]:
        algorithm = as_leaves(algorithm)
        rounds, down, up, infos, finite, last, rebuilt = [], [], [], [], True, carry, 0
        spent = (0, 0, 0)
        watch, compiling = Stopwatch(), self.compiled()
        while len(rounds) < iterations and finite:
            try:
                fed = MessageFederation(self, algorithm, carry)
                state, info = self.program(algorithm, fed, carry.state)
            except StateLost as lost:
                rebuilt += 1
                if rebuilt > _REBUILDS:
                    raise
                carry = self._rebuild(algorithm, carry, lost)
                continue
            rebuilt = 0
            last, carry = carry, Carry(state, fed.client_state, carry.iteration + 1)
            infos.append(jax.tree.map(np.asarray, (info, observe(last.state, state, np))))
            finite = bool(within(state, info, jnp.asarray(limit, jnp.result_type(float))))
            if finite:
                rounds.append(fed.rounds)
                down.append(fed.bytes_down)
                up.append(fed.bytes_up)
            else:
                spent = (fed.rounds, fed.bytes_down, fed.bytes_up)
        info, seen = jax.tree.map(lambda *leaves: np.stack(leaves), *infos) if infos else (None, None)
        seconds = max(0.0, watch.seconds() - (self.compiled() - compiling))
        last = None if finite else last
        return carry, Record(len(rounds), rounds, down, up, info, finite, seconds, last, seen, spent)

    def compiled(self) -> float:
        """Seconds spent so far in calls that compiled elsewhere, where that is known."""
        return 0.0

    def _rebuild(self, algorithm: Algorithm, carry: Carry, lost: StateLost) -> Carry:
        """All clients' states anew, and with them what the server keeps beside x and y."""
        if self.faults is None or self.faults.lost_state != REBUILD:
            raise lost
        if self.protocol.at_sites is not None:
            raise RunError(f"{lost} Its blocks of x and y are kept there alone (keep='site'), and are gone with it.")
        state = carry.state
        self.transport.restart(state.x, state.y, self.purpose)
        self.kept = self.first_tags()
        return Carry(strong(algorithm.begun_again(state)), self.kept, carry.iteration)


class MessageFederation(Federation):
    """`fed` for one iteration, run round by round."""

    def __init__(self, execution: Messaging, algorithm: Algorithm, carry: Carry):
        self.clients, self.cohort_size = execution.data.clients, execution.protocol.cohort
        self.weighted = execution.data.weights is not None
        self.rounds = self.bytes_down = self.bytes_up = 0
        self.client_state = np.array(carry.client_state)
        self._run, self._algorithm, self._iteration = execution, algorithm, carry.iteration
        self._key = jax.random.fold_in(execution.key, carry.iteration)
        self._scopes, self._counter = Scopes(), 0

    def ask(
        self,
        method: Callable[..., PyTree],
        message: tuple,
        combine: Combine,
        replies: bool | tuple[Flag, ...],
        cohort: Cohort,
        beside: bool,
    ) -> PyTree:
        path = self._scopes.advance()
        client_method(self._algorithm, method)
        message, flags = normalise(message)
        sent = tuple(bool(flag) for flag in flags)
        flags, combine = parts_wanted(replies, combine)
        wanted = tuple(map(bool, flags))
        cohort = check_given(cohort, self.clients)
        self._asked = self.cohort_size if cohort is None else cohort.shape[0]
        exchange = _Exchange(path, self._tick(), sent, wanted, _payloads(message, sent), beside)
        index, answers = self._until_enough(exchange, cohort)
        slots = [slot for slot, client in enumerate(index) if int(client) in answers]
        arrived = [answers[int(index[slot])] for slot in slots]
        stacked = jax.tree.map(lambda *leaves: on_device(np.stack(leaves)), *arrived)
        stacked = stacked[0] if len(wanted) == 1 else stacked
        everyone, asked = self._run.data.weights, jnp.asarray(index)
        weights = full_weights(everyone, asked, self.clients)
        present = None
        if len(slots) < len(index):
            present = jnp.zeros(len(index), bool).at[jnp.asarray(slots)].set(True)
            weights = None if weights is None else weights[jnp.asarray(slots)]
            weights = None if weights is None else weights / weights.sum()
        self._share = answered(everyone, asked, present, self.clients)
        reply = combine_replies(combine, owned.without(stacked), weights)
        if owned.nodes(stacked):
            here = jnp.asarray(index[np.asarray(slots)])
            self._present = owned.answered(here, None, self.clients)
            reply = owned.with_blocks(reply, stacked, here, None, self.clients)
        return mask_reply(reply, wanted)

    def _until_enough(self, exchange: _Exchange, cohort: Cohort) -> tuple[np.ndarray, dict[int, PyTree]]:
        """(The cohort asked, replies by client), tried again until enough have answered."""
        run, faults, have, needed = self._run, self._run.faults, 0, 1
        attempts = 1 if faults is None else 1 + faults.retries
        for attempt in range(attempts):
            tag = (self._iteration, exchange.counter, attempt)
            key = attempt_key(run.key, tag)
            index = np.asarray(self._sample(key) if cohort is None else cohort)
            replies = self._attempt(exchange, tag, key, index)
            have = sum(int(client) in replies for client in index)
            needed = 1 if faults is None else faults.enough(len(index))
            if have >= needed:
                for client in replies:
                    self.client_state[client] = tag
                return index, replies
        name, why = run.protocol.sites[exchange.path].name, run.roster.latest
        raise TooFewReplies(
            f"{have} of {self._asked} clients answered {name} in iteration {self._iteration + 1}, tried {attempts} "
            f"times, where {needed} are needed (the latest failure: {why}). Mend what failed and resume from the last "
            "checkpoint."
        )

    def _attempt(self, exchange: _Exchange, tag: Tag, key: Key[Array, ""], index: np.ndarray) -> dict[int, PyTree]:
        """One attempt: replies by client, decoded. Takes note of who failed, and keeps the books."""
        run, faults = self._run, self._run.faults
        left_out = run.roster.left_out(run.transport.there)
        asked = [client for client in dict.fromkeys(map(int, index)) if client not in left_out]
        gone = set()
        if run.dropout:
            gone = set(index[~np.asarray(stays(key, jnp.asarray(index), run.dropout))].tolist()) & set(asked)
        requests = {client: self._request(exchange, tag, client) for client in asked if client not in gone}
        begin, before = time.perf_counter(), run.transport.travelled()
        answers = run.transport.ask(requests, None if faults is None else faults.deadline)
        seconds = time.perf_counter() - begin
        replies = self._decoded(exchange, answers)
        if faults is None and answers.failures:
            raise next(iter(answers.failures.values()))
        if lost := [error for error in answers.failures.values() if isinstance(error, StateLost)]:
            raise lost[0]
        count = lambda clients: sum(int(client) in clients for client in index)
        down, up = len(exchange.payload(0)) * count(asked), sum(len(p) * count([c]) for c, p in answers.replies.items())
        self.bytes_down, self.bytes_up = self.bytes_down + down, self.bytes_up + up
        self.rounds += not exchange.beside
        run.roster.note(replies, answers.failures, not exchange.beside)
        if run.watch is not None:
            why = {client: str(error) or type(error).__name__ for client, error in answers.failures.items()}
            why |= dict.fromkeys(gone, "dropped out") | dict.fromkeys(left_out & set(index.tolist()), "left out")
            after, name = run.transport.travelled(), run.protocol.sites[exchange.path].name
            wire = (None, None) if before is None or after is None else (after[0] - before[0], after[1] - before[1])
            who = (tuple(asked), tuple(sorted(replies)), why, tuple(sorted(answers.restarted)))
            run.watch(Round(tag[0] + 1, name, tag[2] + 1, *who, answers.seconds, seconds, down, up, *wire))
        return replies

    def _decoded(self, exchange: _Exchange, answers: Answers) -> dict[int, PyTree]:
        """The replies that can be used; the others join the failures."""
        schema, wanted = self._run.protocol.sites[exchange.path].reply, exchange.wanted
        replies = {}
        for client, payload in answers.replies.items():
            try:
                replies[client] = decode(reply_parts(schema, wanted), payload, wanted)
            except RunError as error:
                answers.failures[client] = error
        bad = [client for client, reply in replies.items() if not _finite(reply)]
        if self._run.faults is not None and len(bad) < len(replies):  # where all are, it is the iterates that blew up
            for client in bad:
                answers.failures[client] = ValueError("numbers that are not finite")
                del replies[client]
        return replies

    def _request(self, exchange: _Exchange, tag: Tag, client: int) -> Request:
        counted, kept = (as_tag(tags[client]) for tags in (self.client_state, self._run.kept))
        return Request(
            self._run.places[exchange.path], tag, exchange.sent, exchange.wanted, counted, kept, exchange.payload(client),
            self._run.purpose,
        )  # fmt: skip

    # Loops and draws ------------------------------------------------------------------------------------------------

    def repeat(
        self,
        times: Index,
        body: Callable[[Int[Array, ""], PyTree], PyTree],
        carry: PyTree,
        most: int | None = None,
    ) -> PyTree:
        times = check_times(times, most)
        path = self._scopes.advance()
        for t in range(int(times)):
            carry = self._turn(path, body, t, carry)
        return carry

    def until(
        self,
        condition: Callable[[PyTree], Flag],
        body: Callable[[Int[Array, ""], PyTree], PyTree],
        carry: PyTree,
        most: int,
    ) -> PyTree:
        check_times(most, most)
        path = self._scopes.advance()
        for t in range(most):
            if bool(condition(carry)):
                break
            carry = self._turn(path, body, t, carry)
        return carry

    def _turn(self, path: Path, body: Callable[[Int[Array, ""], PyTree], PyTree], t: int, carry: PyTree) -> PyTree:
        new = self._scopes.inside(path, lambda: body(jnp.asarray(t, jnp.int32), carry))
        check_carry(carry, new)
        return new

    def randint(self, low: int, high: int) -> Int[Array, ""]:
        self._scopes.advance()
        check(low < high, f"fed.randint(low, high) needs low < high; got {low}, {high}.")
        return jax.random.randint(exchange_key(self._key, self._tick()), (), low, high, dtype=jnp.int32)

    def draw_cohort(self, size: int | None = None) -> Int[Array, " cohort"]:
        self._scopes.advance()
        return self._sample(exchange_key(self._key, self._tick()), size)

    def _sample(self, key: Key[Array, ""], size: int | None = None) -> Int[Array, " cohort"]:
        size = self.cohort_size if size is None else check_cohort(size, self.clients)
        return sample_cohort(key, self.clients, size, self._run.data.weights)

    def _tick(self) -> int:
        self._counter += 1
        return self._counter - 1


@dataclasses.dataclass(frozen=True)
class _Exchange:
    """What an exchange sends, the same at every attempt."""

    path: Path
    counter: int
    sent: tuple[bool, ...]
    wanted: tuple[bool, ...]
    payload: Callable[[int], bytes]  # of a client: all are as long
    beside: bool


def _payloads(message: tuple, sent: tuple[bool, ...]) -> Callable[[int], bytes]:
    """What each client is sent: all the same, but for blocks of its own."""
    of = lambda message: encode(*message_schema(message, sent))
    if owned.nodes(message):
        return functools.cache(lambda client: of(owned.own(message, client)))
    payload = of(message)
    return lambda client: payload


def _finite(reply: PyTree) -> bool:
    inexact = [leaf for leaf in jax.tree.leaves(reply) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in inexact)
