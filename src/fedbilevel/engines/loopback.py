"""The loopback engine: one client after the other, with real bytes in between.

Also the debug engine. Each client holds its own rows only, sees a message only after it has been written to bytes and
read back, and answers in bytes; the replies are shuffled on their way and put in order by client. A client method that
fails is reported with the client, the method and the shapes it was sent.
"""

from __future__ import annotations

import dataclasses
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..errors import ClientError, InputError, check
from ..federation import (
    Client,
    Federation,
    Reply,
    check_cohort,
    client_key,
    client_method,
    combine_replies,
    exchange_key,
    full_weights,
    sample_cohort,
)
from ..problem import describe, strong
from ..protocol import as_leaves, client_state
from ..protocol import step as iteration
from ..tracing import (
    Scopes,
    check_carry,
    check_same_size,
    check_times,
    mask_reply,
    normalise,
    reply_parts,
    wanted_flags,
)
from ..wire import decode, encode, message_schema, rebuild_message
from .base import Carry, Engine, Execution, Record, plan, within


@dataclasses.dataclass(frozen=True)
class Loopback(Engine):
    """Run an algorithm client by client, in this process.

    Args:
        cohort: how many clients each exchange asks; None for all.
        jit: compile the client methods; False runs them line by line, for a debugger or `print`.
        shuffle: seed of the order in which clients are asked and replies arrive (it must not matter).
    """

    cohort: int | None = None
    jit: bool = True
    shuffle: int = 0

    def __post_init__(self):
        if self.cohort is not None:
            check_cohort(self.cohort, 2**31)

    def bind(self, problem, data, algorithm, state, key, program=iteration):
        cohort = check_cohort(self.cohort, data.clients)
        return _Looped(self, problem, data, key, plan(self, problem, data, algorithm, state, cohort, program), program)


class _Looped(Execution):
    def __init__(self, engine, problem, data, key, protocol, program):
        super().__init__(engine, problem, data, key, protocol, program)
        self.rows = [(data.inner.alone(i), data.outer.alone(i)) for i in range(data.clients)]
        self.order = np.random.default_rng(engine.shuffle)
        self.compiling = 0.0

    def start(self, algorithm, state):
        one = client_state(algorithm, state)
        return Carry(strong(state), None if one is None else [one] * self.data.clients, 0)

    def advance(self, algorithm, carry, iterations, limit):
        algorithm = as_leaves(algorithm)
        rounds, down, up, infos, finite = [], [], [], [], True
        begin, self.compiling = time.perf_counter(), 0.0
        for _ in range(iterations):
            states = None if carry.client_state is None else list(carry.client_state)
            fed = _LoopedFederation(self, algorithm, jax.random.fold_in(self.key, carry.iteration), states)
            state, info = self.program(algorithm, fed, carry.state)
            carry = Carry(state, fed.client_state, carry.iteration + 1)
            infos.append(jax.tree.map(np.asarray, info))
            finite = bool(within(state, info, jnp.asarray(limit, jnp.result_type(float))))
            if not finite:
                break
            rounds.append(fed.rounds)
            down.append(fed.bytes_down)
            up.append(fed.bytes_up)
        info = jax.tree.map(lambda *leaves: np.stack(leaves), *infos) if infos else None
        seconds = time.perf_counter() - begin - self.compiling
        return carry, Record(len(rounds), rounds, down, up, info, finite, seconds)

    def ask(self, algorithm, name, client, message):
        """Run a client method, compiled once for each method and shapes; a call that compiles is not timed."""
        if not self.engine.jit:
            return getattr(algorithm, name)(client, *message)
        begin, before = time.perf_counter(), len(_traced)
        out = jax.block_until_ready(_call(algorithm, name, client, message))
        if len(_traced) > before:
            self.compiling += time.perf_counter() - begin
        return out


_traced: list[str] = []  # grows whenever a client method is traced, and so compiled


@eqx.filter_jit
def _call(algorithm, name, client, message):
    _traced.append(name)
    return getattr(algorithm, name)(client, *message)


class _LoopedFederation(Federation):
    def __init__(self, execution: _Looped, algorithm, key, client_state):
        self.clients, self.cohort_size = execution.data.clients, execution.protocol.cohort
        self.weighted = execution.data.weights is not None
        self.rounds = self.bytes_down = self.bytes_up = 0
        self.client_state = client_state
        self._run, self._algorithm, self._key = execution, algorithm, key
        self._scopes, self._counter = Scopes(), 0

    def ask(self, method, message, combine, replies, cohort, beside):
        path = self._scopes.advance()
        name, _ = client_method(self._algorithm, method)
        message, flags = normalise(message)
        sent = tuple(bool(flag) for flag in flags)
        wanted = tuple(bool(flag) for flag in wanted_flags(replies))
        site = self._run.protocol.sites[path]
        key = exchange_key(self._key, self._tick())
        cohort = check_same_size(cohort, self.cohort_size)
        index = self._sample(key) if cohort is None else cohort
        pieces, travels = message_schema(message, sent)
        payload = encode(pieces, travels)
        answers, states = {}, {}
        for slot in self._run.order.permutation(len(index)):
            client = int(index[slot])
            answer, states[client] = self._one(site, name, client, payload, sent, wanted, key)
            self.bytes_down += len(payload)
            self.bytes_up += len(answer)
            answers[int(slot)] = answer
        if self.client_state is not None:
            for client, state in states.items():
                self.client_state[client] = state
        self.rounds += not beside
        arrived = [decode(reply_parts(site.reply, wanted), answers[slot], wanted) for slot in sorted(answers)]
        stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *arrived)
        stacked = stacked[0] if len(wanted) == 1 else stacked
        weights = full_weights(self._run.data.weights, jnp.asarray(index), self.clients)
        return mask_reply(combine_replies(combine, stacked, weights), wanted)

    def _one(self, site, name, index, payload, sent, wanted, key):
        """One client: bytes in, bytes out, and its state afterwards."""
        schema, travels = message_schema(site.message, sent)
        message = rebuild_message(site.message, decode(schema, payload, travels), sent)
        message = jax.tree.map(jnp.asarray, message)
        state = None if self.client_state is None else self.client_state[index]
        flags = tuple(jnp.asarray(flag) for flag in wanted)
        client = Client(self._run.problem, self._run.rows[index], state, client_key(key, index), flags)
        try:
            out = self._run.ask(self._algorithm, name, client, message)
            out = out if isinstance(out, Reply) else Reply(out, state)
            reply = jax.tree.map(np.asarray, out.reply)
        except InputError:
            raise
        except Exception as error:  # whatever the user's method raises
            where = f"client {index} failed in {type(self._algorithm).__name__}.{name}"
            inner, outer = (rows.count for rows in self._run.rows[index])
            what = f"it was sent {describe(message)} and holds {int(inner)} inner and {int(outer)} outer rows"
            raise ClientError(f"{where}: {type(error).__name__}: {error} ({what}).") from error
        same = describe(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), reply)) == describe(site.reply)
        check(
            same,
            f"client {index} replied to {name} with {describe(reply)}, where the protocol says {describe(site.reply)}.",
        )
        return encode(reply_parts(reply, wanted), wanted), out.state

    def repeat(self, times, body, carry, most=None):
        times = check_times(times, most)
        path = self._scopes.advance()
        for t in range(int(times)):
            carry = self._turn(path, body, t, carry)
        return carry

    def until(self, condition, body, carry, most):
        check_times(most, most)
        path = self._scopes.advance()
        for t in range(most):
            if bool(condition(carry)):
                break
            carry = self._turn(path, body, t, carry)
        return carry

    def _turn(self, path, body, t, carry):
        new = self._scopes.inside(path, lambda: body(jnp.asarray(t, jnp.int32), carry))
        check_carry(carry, new)
        return new

    def randint(self, low, high):
        self._scopes.advance()
        check(low < high, f"fed.randint(low, high) needs low < high; got {low}, {high}.")
        return jax.random.randint(exchange_key(self._key, self._tick()), (), low, high, dtype=jnp.int32)

    def draw_cohort(self):
        self._scopes.advance()
        return self._sample(exchange_key(self._key, self._tick()))

    def _sample(self, key):
        return sample_cohort(key, self.clients, self.cohort_size, self._run.data.weights)

    def _tick(self) -> int:
        self._counter += 1
        return self._counter - 1
