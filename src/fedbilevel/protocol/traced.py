"""A federation inside a traced program: shared by the protocol trace and by the simulation.

The compiled program counts, per call site of `fed.average`, how often it was reached and how often each conditional
part travelled; bytes follow from these counts outside, in Python integers.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from ..cohorts import answered, check_cohort, exchange_key, sample_cohort
from ..compiled import traced
from ..errors import check
from ..federation import Client, Combine, Federation
from ..jaxprs import get_opaque_trace_state
from .calls import answer, check_beside, check_carry, check_given, check_times, client_method
from .sites import Path, Site, is_static, mask_reply, normalise, site, wanted_flags


class Scopes:
    """Where in the server program we are: nested loops, and how many communications each has had so far.

    Raises `InputError` when `fed` is used inside a transformation that the engine did not open itself.
    """

    def __init__(self):
        self._path: Path = ()
        self._next = 0
        self._level = get_opaque_trace_state(convention="nnx")

    def check(self) -> None:
        """Refuse a communication inside `lax.scan`, `vmap` or `jit`."""
        inside = get_opaque_trace_state(convention="nnx") != self._level
        check(
            not inside,
            "fed was used inside jax.lax.scan, vmap or jit: use fed.repeat (or fed.until) for loops of rounds.",
        )

    def advance(self) -> Path:
        """The path of the next call site or loop."""
        self.check()
        self._next += 1
        return (*self._path, self._next - 1)

    def inside(self, path: Path, body: Callable[[], Any]) -> Any:
        """Run `body` as the inside of the loop at `path`."""
        saved = self._path, self._next, self._level
        self._path, self._next, self._level = path, 0, get_opaque_trace_state(convention="nnx")
        try:
            return body()
        finally:
            self._path, self._next, self._level = saved


class TracedFederation(Federation):
    """`fed` while `step` is traced; `sites` collects the exchanges, a subclass says what an exchange computes.

    What the program changes on the way (the ledger: exchange counter, counts per site, client state) is threaded
    through the compiled loops beside the algorithm's own carry.
    """

    drops = False  # whether clients may drop out; the counts then have a second row, of replies
    _replied: Any = None  # how many clients answered the exchange just made, where that may be fewer than were asked

    def __init__(
        self,
        algorithm: Any,
        clients: int,
        cohort: int,
        weights: Any,
        key: Key[Array, ""],
        layout: dict[Path, int] | None,
    ):
        self.clients, self.cohort_size, self.weighted = clients, cohort, weights is not None
        self.sites: dict[Path, Site] = {}
        self._algorithm, self._weights, self._key = algorithm, weights, key
        self._scopes = Scopes()
        self._counter: Any = jnp.zeros((), jnp.int32)
        self.counts: dict[Path, Any] | None = None
        if layout is not None:
            rows = (2,) if self.drops else ()
            self.counts = {path: jnp.zeros((*rows, 1 + flags), jnp.int32) for path, flags in layout.items()}
        self.client_state: PyTree = None
        self._at: Path = ()  # the call site of the exchange being made

    @abc.abstractmethod
    def exchange(
        self, name: str, method: Callable, message: PyTree, combine: Combine, wanted: tuple, key: Any, cohort: Any
    ) -> tuple[PyTree, PyTree]:
        """(The shapes of one client's reply, the cohort's combined) to a message (`When` parts masked)."""

    def replied(self, name: str, method: Callable, client: Client, message: tuple) -> PyTree:
        """What a client replies. Its method is traced once for all programs, but where features know x by its very arrays,
        of which a part of a program has others."""
        problem = client.problem
        if problem.features is not None:
            return method(client, *message)
        parts = client.rows, client.state, client.key, client.wanted, client.index
        return traced(answer, problem, self._algorithm, name, parts, message)

    # The capability -------------------------------------------------------------------------------------------------

    def ask(self, method, message, combine, replies, cohort, beside):
        path = self._scopes.advance()
        name, method = client_method(self._algorithm, method)
        message, sent = normalise(message)
        wanted = wanted_flags(replies)
        key = exchange_key(self._key, self._counter)
        cohort = check_given(cohort, self.clients)
        self._asked = self.cohort_size if cohort is None else cohort.shape[0]
        self._share = answered(self._weights, self._asked, None, self.clients)
        self._at = path
        shapes, reply = self.exchange(name, method, message, combine, wanted, key, cohort)
        check_beside(beside, path, self.sites)
        self.sites[path] = site(path, name, message, shapes, sent, wanted, self._asked, not beside)
        reply = mask_reply(reply, wanted)
        flags = self.travelled([flag for flag in (*sent, *wanted) if not is_static(flag)])
        if self.counts is not None:
            travelled = jnp.stack([jnp.asarray(flag, jnp.int32) for flag in (True, *flags)])
            if self.drops:
                travelled = jnp.stack([travelled, travelled * self._replied])
            self.counts = {**self.counts, path: self.counts[path] + travelled}
        self._counter = self._counter + 1
        return reply

    def travelled(self, flags: list[Any]) -> list[Any]:
        """What is counted for the conditional parts of an exchange."""
        return flags

    def repeat(self, times, body, carry, most=None):
        path = self._scopes.advance()
        times = check_times(times, most)
        run = self._body(path, body)
        ledger, carry = jax.lax.fori_loop(0, times, run, (self._ledger(), carry))
        self._restore(ledger)
        return carry

    def until(self, condition, body, carry, most):
        path = self._scopes.advance()
        check_times(most, most)
        run = self._body(path, body)

        def going(loop):
            t, (_, carry) = loop
            return (t < most) & jnp.logical_not(condition(carry))

        start = (jnp.zeros((), jnp.int32), (self._ledger(), carry))
        _, (ledger, carry) = jax.lax.while_loop(going, lambda loop: (loop[0] + 1, run(*loop)), start)
        self._restore(ledger)
        return carry

    def randint(self, low, high):
        self._scopes.advance()
        check(low < high, f"fed.randint(low, high) needs low < high; got {low}, {high}.")
        key = exchange_key(self._key, self._counter)
        self._counter = self._counter + 1
        return jax.random.randint(key, (), low, high, dtype=jnp.int32)

    def draw_cohort(self, size=None):
        self._scopes.advance()
        key = exchange_key(self._key, self._counter)
        self._counter = self._counter + 1
        return self.sample(key, size)

    def sample(self, key, size=None):
        """The cohort of one exchange."""
        size = self.cohort_size if size is None else check_cohort(size, self.clients)
        return sample_cohort(key, self.clients, size, self._weights)

    # Threading the ledger through loops -----------------------------------------------------------------------------

    def _ledger(self):
        return self._counter, self.counts, self.client_state

    def _restore(self, ledger) -> None:
        self._counter, self.counts, self.client_state = ledger

    def _body(self, path: Path, body):
        def run(t, both):
            ledger, carry = both
            self._restore(ledger)
            new = self._scopes.inside(path, lambda: body(jnp.asarray(t, jnp.int32), carry))
            check_carry(carry, new)
            return self._ledger(), new

        return run
