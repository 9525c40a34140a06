"""The client's half of an engine that sends messages: one client, its rows, its state, and its own copy of the algorithm.

A request names an exchange of the protocol by its number and carries numbers; nothing in it says what to run beyond that,
and what is not in the protocol is refused. A client that keeps state (control variates, say) renews it for good only when
the server says that its reply counted: a reply that came too late, or an exchange that was tried again, leaves no trace.
Blocks of x and y that are kept here (`protocol.at_sites`) are a part of that state.
"""

from __future__ import annotations

import collections
import time
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from ... import owned
from ...algorithm import Algorithm
from ...arrays import on_device
from ...clock import spent_compiling
from ...cohorts import client_key
from ...compiled import CHEAPLY, Bound, run
from ...component import title_of
from ...data import ClientRows
from ...errors import ClientError, InputError, RunError
from ...federation import Reply
from ...problem import Problem, describe, strong
from ...program import helpers_of
from ...protocol import at_sites as kept_here
from ...protocol import client_state
from ...protocol.at_sites import Held
from ...protocol.calls import alike, answer
from ...protocol.sites import Site, reply_parts
from ...protocol.table import Protocol
from ...protocol.wire import conditional_parts, decode, encode, message_schema, rebuild_message
from ..faults import StateLost
from .transport import START, Request, Tag, attempt_key


class ClientSide:
    """Answers requests.

    Attributes:
        states: the client's state by tag, of those that the server may still come back to.

    Args:
        index: which of the clients this one is: it decides its random keys.
        state: what it keeps at the start (`first_held`), or None.
        run: runs client methods, compiled or not.
        name: what it is called in messages; None: client INDEX.
    """

    def __init__(
        self,
        problem: Problem,
        rows: tuple[ClientRows, ClientRows],
        algorithm: Algorithm,
        protocol: Protocol,
        key: Key[Array, ""],
        index: int,
        state: PyTree,
        run: Methods,
        name: str | None = None,
    ):
        self.states: dict[Tag, PyTree] = {START: state}
        self.keeps = state is not None
        self._problem, self._rows, self._algorithm, self._key = problem, rows, algorithm, key
        self._index = np.int32(index)
        self._sites, self._at_sites = [protocol.sites[path] for path in sorted(protocol.sites)], protocol.at_sites
        self._run = run
        self._name = f"client {index}" if name is None else name

    def answer(self, request: Request) -> bytes:
        """The reply's numbers.

        Raises:
            ClientError: the method failed, or replied with something else than the protocol says.
            RunError: the request is not of this protocol.
            StateLost: the state that the request goes on from is not here.
        """
        site = self._site(request)
        schema, travels = message_schema(site.message, request.sent)
        message = rebuild_message(site.message, decode(schema, request.payload, travels), request.sent)
        state, held = self._state(request), None
        if isinstance(state, Held):
            message, held = self._with_blocks(site, request, message, state)
            state = held.own
        parts = _Parts(
            self._rows, state, self._run.key(self._key, request.tag), tuple(map(np.bool_, request.wanted)), self._index
        )
        try:
            out = self._run(self._problem, self._algorithm, site.name, parts, message)
            out = out if isinstance(out, Reply) else Reply(out, state)
            reply = jax.tree.map(np.asarray, out.reply)
        except InputError:
            raise
        except Exception as error:  # whatever the user's method raises
            where = f"{self._name} failed in {title_of(self._algorithm)}.{site.name}"
            inner, outer = (rows.count for rows in self._rows)
            what = f"it was sent {describe(message)} and holds {int(inner)} inner and {int(outer)} outer rows"
            raise ClientError(f"{where}: {type(error).__name__}: {error} ({what}).") from error
        if not alike(reply, site.reply):  # words are made where they are needed alone
            raise InputError(
                f"{self._name} replied to {site.name} with {describe(reply)}, "
                f"where the protocol says {describe(site.reply)}."
            )
        if self.keeps:
            self.states[request.tag] = out.state if held is None else self._noted(held, site, request, reply, out.state)
        return encode(reply_parts(reply, request.wanted), request.wanted)

    def _with_blocks(self, site: Site, request: Request, message: PyTree, held: Held) -> tuple[PyTree, Held]:
        """(The message with the blocks that are kept here, what is kept as the iteration begins)."""
        assert self._at_sites is not None
        held, blocks = run(
            kept_here.sent, self._problem, self._algorithm, self._at_sites, site.path, held,
            np.int32(request.tag[0]), np.int32(request.tag[1]), self._key,
            options=CHEAPLY,
        )  # fmt: skip
        return owned.keeping(message, blocks), held

    def _noted(self, held: Held, site: Site, request: Request, reply: PyTree, own: PyTree) -> Held:
        """What is kept after a reply."""
        assert self._at_sites is not None
        blocks = kept_here.blocks_in(reply)
        if not all(bool(np.isfinite(block).all()) for block in blocks):
            raise RunError(f"the blocks that {self._name} keeps are no longer finite: take smaller steps.")
        return self._at_sites.noted(held, site.path, request.tag[1], reply, own)

    def blocks(self, state: Held, iteration: int) -> list[Array]:
        """The blocks that are kept here of what the server's program returns, after so many iterations."""
        given = self._algorithm, self._at_sites, state, np.int32(iteration), self._key
        return run(kept_here.ended, self._problem, *given, options=CHEAPLY)

    def restart(self, state: PyTree) -> None:
        """Begin again with a first state."""
        self.states = {START: state}

    def _site(self, request: Request) -> Site:
        if not 0 <= request.place < len(self._sites):
            raise RunError(f"exchange {request.place} is not in the protocol, which has {len(self._sites)}.")
        site = self._sites[request.place]
        if len(request.sent) != conditional_parts(site.message) or len(request.wanted) != len(site.up):
            raise RunError(f"the request for {site.name} has flags for other parts than the protocol's.")
        return site

    def _state(self, request: Request) -> PyTree:
        if not self.keeps:
            return None
        if request.counted not in self.states:
            raise StateLost(f"{self._name} has no state of exchange {request.counted}.")
        alive = lambda tag: request.kept <= tag <= request.counted
        self.states = {tag: state for tag, state in self.states.items() if alive(tag)}
        return self.states[request.counted]


def first_held(algorithm: Algorithm, protocol: Protocol, state: PyTree, client: int) -> PyTree:
    """What a client keeps at the start: what its algorithm has it keep, and the blocks that are kept there; None: nothing.

    Args:
        state: the server's first.
    """
    if protocol.at_sites is not None:
        return strong(protocol.at_sites.begin(algorithm, state, client))
    return client_state(algorithm, owned.own(state, client) if owned.nodes((state.x, state.y)) else state)


class _Parts(NamedTuple):
    """What a `Client` is made of, in numpy's arrays where that is cheaper: thousands of calls spend their time on this.

    Attributes:
        key: (2,) uint32, that of the attempt; the client's own follows from it and its index.
    """

    rows: tuple[ClientRows, ClientRows]
    state: PyTree
    key: np.ndarray
    wanted: tuple[np.bool_, ...]
    index: np.int32

    def of_client(self) -> tuple:
        """The same of this client, in JAX's arrays."""
        index = jnp.asarray(self.index, jnp.int32)
        key = client_key(jax.random.wrap_key_data(jnp.asarray(self.key, jnp.uint32), impl="threefry2x32"), index)
        wanted = tuple(jnp.asarray(flag, bool) for flag in self.wanted)
        return self.rows, self.state, key, wanted, index


class Methods:
    """Runs client methods, each compiled once for its shapes.

    Attributes:
        traced: how often each method was traced, and so compiled, in this process.
    """

    traced: ClassVar[collections.Counter[str]] = collections.Counter()

    def __init__(self, jit: bool = True):
        self.jit = jit
        self._bound: tuple[Problem | None, Algorithm | None, Bound | None] = (None, None, None)
        self._key: tuple[Key[Array, ""] | None, Tag, np.ndarray] = (None, START, np.zeros(0, np.uint32))

    def key(self, base: Key[Array, ""], tag: Tag) -> np.ndarray:
        """The numbers of an attempt's key, which all clients that are asked here share."""
        if self._key[0] is not base or self._key[1] != tag:
            self._key = base, tag, np.asarray(jax.random.key_data(attempt_key(base, tag)))
        return self._key[2]

    def __call__(self, problem: Problem, algorithm: Algorithm, name: str, parts: _Parts, message: PyTree) -> PyTree:
        if not self.jit:
            with helpers_of(problem):
                return answer(problem, algorithm, name, parts.of_client(), jax.tree.map(on_device, message))
        known, same, bound = self._bound
        if known is not problem or same is not algorithm or bound is None:
            bound = Bound(_call, problem, algorithm)
            self._bound = problem, algorithm, bound
        begin, before = time.perf_counter(), self.traced.total()
        out = jax.block_until_ready(bound(name, parts, message))
        if self.traced.total() > before:  # all of the call: what JAX calls compiling is not all there is to it
            spent_compiling(begin, time.perf_counter())
        return out


def _call(problem: Problem, algorithm: Algorithm, name: str, parts: _Parts, message: PyTree) -> PyTree:
    Methods.traced[name] += 1
    return answer(problem, algorithm, name, parts.of_client(), message)
