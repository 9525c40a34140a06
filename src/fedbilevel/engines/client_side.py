"""The client's half of an engine that sends messages: one client, its rows, its state, and its own copy of the algorithm.

A request names an exchange of the protocol by its number and carries numbers; nothing in it says what to run beyond that,
and what is not in the protocol is refused. A client that keeps state (control variates, say) renews it for good only when
the server says that its reply counted: a reply that came too late, or an exchange that was tried again, leaves no trace.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from ..clock import spent_compiling
from ..data import ClientRows
from ..errors import ClientError, InputError, RunError
from ..exchanges import Protocol
from ..federation import Client, Reply, client_key
from ..problem import Problem, describe
from ..program import helpers_of, run
from ..tracing import alike, reply_parts
from ..wire import conditional_parts, decode, encode, message_schema, rebuild_message
from .faults import StateLost
from .transport import START, Request, Tag, attempt_key


class ClientSide:
    """Answers requests.

    Attributes:
        states: the client's state by tag, of those that the server may still come back to.

    Args:
        index: which of the clients this one is: it decides its random keys.
        state: what it keeps at the start (`Algorithm.client_init`), or None.
        run: runs (algorithm, method's name, client, message), compiled or not.
        name: what it is called in messages; None: client INDEX.
    """

    def __init__(
        self,
        problem: Problem,
        rows: tuple[ClientRows, ClientRows],
        algorithm: Any,
        protocol: Protocol,
        key: Key[Array, ""],
        index: int,
        state: PyTree,
        run: Callable[..., Any],
        name: str | None = None,
    ):
        self.states: dict[Tag, PyTree] = {START: state}
        self.keeps = state is not None
        self._problem, self._rows, self._algorithm, self._key, self._index = problem, rows, algorithm, key, index
        self._sites = [protocol.sites[path] for path in sorted(protocol.sites)]
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
        message = jax.tree.map(jnp.asarray, message)
        state = self._state(request)
        flags = tuple(jnp.asarray(flag) for flag in request.wanted)
        key = client_key(attempt_key(self._key, request.tag), self._index)
        client = Client(self._problem, self._rows, state, key, flags, jnp.asarray(self._index, jnp.int32))
        try:
            out = self._run(self._algorithm, site.name, client, message)
            out = out if isinstance(out, Reply) else Reply(out, state)
            reply = jax.tree.map(np.asarray, out.reply)
        except InputError:
            raise
        except Exception as error:  # whatever the user's method raises
            where = f"{self._name} failed in {type(self._algorithm).__name__}.{site.name}"
            inner, outer = (rows.count for rows in self._rows)
            what = f"it was sent {describe(message)} and holds {int(inner)} inner and {int(outer)} outer rows"
            raise ClientError(f"{where}: {type(error).__name__}: {error} ({what}).") from error
        if not alike(reply, site.reply):  # words are made where they are needed alone
            raise InputError(
                f"{self._name} replied to {site.name} with {describe(reply)}, "
                f"where the protocol says {describe(site.reply)}."
            )
        if self.keeps:
            self.states[request.tag] = out.state
        return encode(reply_parts(reply, request.wanted), request.wanted)

    def restart(self, state: PyTree) -> None:
        """Begin again with a first state."""
        self.states = {START: state}

    def _site(self, request: Request) -> Any:
        known = 0 <= request.place < len(self._sites)
        if not known:
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


class Methods:
    """Runs client methods, each compiled once for its shapes.

    Attributes:
        traced: how often each method was traced, and so compiled, in this process.
    """

    traced: ClassVar[collections.Counter[str]] = collections.Counter()

    def __init__(self, jit: bool = True):
        self.jit = jit

    def __call__(self, algorithm: Any, name: str, client: Client, message: tuple) -> Any:
        if not self.jit:
            with helpers_of(client.problem):
                return getattr(algorithm, name)(client, *message)
        begin, before = time.perf_counter(), self.traced.total()
        problem, client = client.problem, dataclasses.replace(client, problem=None)
        out = jax.block_until_ready(run(_call, problem, algorithm, name, client, message))
        if self.traced.total() > before:  # all of the call: what JAX calls compiling is not all there is to it
            spent_compiling(begin, time.perf_counter())
        return out


def _call(problem, algorithm, name, client, message):
    Methods.traced[name] += 1
    client = dataclasses.replace(client, problem=problem)
    return getattr(algorithm, name)(client, *message)
