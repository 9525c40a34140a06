"""A federation inside a traced program: shared by the protocol trace and by the simulation.

The compiled program counts, per call site of `fed.average`, how often it was reached and how often each conditional
part travelled; bytes follow from these counts outside, in Python integers.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from ..algorithm import Algorithm
from ..cohorts import answered, check_cohort, exchange_key, sample_cohort
from ..compiled import traced
from ..errors import check
from ..federation import Body, Client, Cohort, Combine, Federation, Flag, Index, Method, Replies
from ..jaxprs import get_opaque_trace_state
from .calls import answer, check_beside, check_carry, check_given, check_times, client_method
from .sites import Path, Site, Wanted, is_static, mask_reply, normalise, parts_wanted, site

Ledger: TypeAlias = tuple[
    Int[Array, ""], dict[Path, Int[Array, " ..."]] | None, PyTree
]  # counter, counts, clients' state
Loop: TypeAlias = tuple[Ledger, PyTree]  # and the algorithm's own carry


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

    @property
    def following(self) -> Path:
        """The path that comes next."""
        return (*self._path, self._next)

    def inside(self, path: Path, body: Callable[[], PyTree]) -> PyTree:
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
    _replied: Index = 0  # how many clients answered the exchange just made, where that may be fewer than were asked

    def __init__(
        self,
        algorithm: Algorithm,
        clients: int,
        cohort: int,
        weights: Float[Array, " clients"] | None,
        key: Key[Array, ""],
        layout: dict[Path, int] | None,
    ):
        self.clients, self.cohort_size, self.weighted = clients, cohort, weights is not None
        self.sites: dict[Path, Site] = {}
        self._algorithm, self._weights, self._key = algorithm, weights, key
        self._scopes = Scopes()
        self._counter: Int[Array, ""] = jnp.zeros((), jnp.int32)
        self.counts: dict[Path, Int[Array, " ..."]] | None = None
        if layout is not None:
            rows = (2,) if self.drops else ()
            self.counts = {path: jnp.zeros((*rows, 1 + flags), jnp.int32) for path, flags in layout.items()}
        self.client_state: PyTree = None
        self._single: set[Path] = set()  # loops of one turn at most
        self._at: Path = ()  # the call site of the exchange being made

    @abc.abstractmethod
    def exchange(
        self,
        name: str,
        method: Method,
        message: PyTree,
        combine: Combine,
        wanted: Wanted,
        key: Key[Array, ""],
        cohort: Cohort,
    ) -> tuple[PyTree, PyTree]:
        """(The shapes of one client's reply, the cohort's combined) to a message (`When` parts masked)."""

    def replied(self, name: str, method: Method, client: Client, message: tuple) -> PyTree:
        """What a client replies; its method is traced once for all programs."""
        parts = client.rows, client.state, client.key, client.wanted, client.index
        return traced(answer, client.problem, self._algorithm, name, parts, message)

    # The capability -------------------------------------------------------------------------------------------------

    def ask(
        self, method: Method, message: tuple, combine: Combine, replies: Replies, cohort: Cohort, beside: bool
    ) -> PyTree:
        path = self._scopes.advance()
        name, method = client_method(self._algorithm, method)
        message, sent = normalise(message)
        wanted, combine = parts_wanted(replies, combine)
        key = self._own_key()
        given = check_given(cohort, self.clients)
        self._asked = self.cohort_size if given is None else given.shape[0]
        self._share = answered(self._weights, self._asked, None, self.clients)
        self._at = path
        shapes, reply = self.exchange(name, method, message, combine, wanted, key, given)
        check_beside(beside, path, self.sites, self._single)
        self.sites[path] = site(path, name, message, shapes, sent, wanted, self._asked, not beside, combine)
        reply = mask_reply(reply, wanted)
        flags = self.travelled([flag for flag in (*sent, *wanted) if not is_static(flag)])
        if self.counts is not None:
            travelled = jnp.stack([jnp.asarray(flag, jnp.int32) for flag in (True, *flags)])
            if self.drops:
                travelled = jnp.stack([travelled, travelled * self._replied])
            self.counts = {**self.counts, path: self.counts[path] + travelled}
        self._counter = self._counter + 1
        return reply

    @property
    def taken(self) -> Int[Array, ""]:
        """How many exchanges and draws there were so far."""
        return self._counter

    def travelled(self, flags: list[Flag]) -> list[Flag]:
        """What is counted for the conditional parts of an exchange."""
        return flags

    def repeat(self, times: Index, body: Body, carry: PyTree, most: int | None = None) -> PyTree:
        path = self.loop(times, most)
        times = check_times(times, most)
        run = self._body(path, body)
        ledger, carry = jax.lax.fori_loop(0, times, run, (self._ledger(), carry))
        self._restore(ledger)
        return carry

    def rarely(self, times: Index, body: Body, carry: PyTree, most: int = 1) -> PyTree:
        """A loop under a condition: what its turns have in common XLA computes before a loop, also where it has no turn."""
        path = self.loop(times, most)
        times = check_times(times, most)
        run = self._body(path, body)
        turns = lambda both: jax.lax.fori_loop(0, times, run, both)
        both = jax.lax.cond(jnp.asarray(times) > 0, turns, lambda both: both, (self._ledger(), carry))
        self._restore(both[0])
        return both[1]

    def until(self, condition: Callable[[PyTree], Flag], body: Body, carry: PyTree, most: int) -> PyTree:
        path = self._scopes.advance()
        check_times(most, most)
        run = self._body(path, body)

        going = lambda loop: (loop[0] < most) & jnp.logical_not(condition(loop[1][1]))
        start = (jnp.zeros((), jnp.int32), (self._ledger(), carry))
        _, (ledger, carry) = jax.lax.while_loop(going, lambda loop: (loop[0] + 1, run(*loop)), start)
        self._restore(ledger)
        return carry

    def loop(self, times: Index, most: int | None) -> Path:
        """The path of the loop that begins."""
        path = self._scopes.advance()
        if most == 1 or (isinstance(times, int) and times == 1):
            self._single.add(path)
        return path

    def randint(self, low: int, high: int) -> Int[Array, ""]:
        self._scopes.advance()
        check(low < high, f"fed.randint(low, high) needs low < high; got {low}, {high}.")
        key = self._own_key()
        self._counter = self._counter + 1
        return jax.random.randint(key, (), low, high, dtype=jnp.int32)

    def draw_cohort(self, size: int | None = None) -> Int[Array, " cohort"]:
        self._scopes.advance()
        cohort = self.sample(self._own_key(), size)
        self._counter = self._counter + 1
        return cohort

    def _own_key(self) -> Key[Array, ""]:
        """The key of the exchange (or draw) that is being made."""
        return exchange_key(self._key, self._counter)

    def sample(self, key: Key[Array, ""], size: int | None = None) -> Int[Array, " cohort"]:
        """The cohort of one exchange."""
        size = self.cohort_size if size is None else check_cohort(size, self.clients)
        return sample_cohort(key, self.clients, size, self._weights)

    # Threading the ledger through loops -----------------------------------------------------------------------------

    def _ledger(self) -> Ledger:
        return self._counter, self.counts, self.client_state

    def _restore(self, ledger: Ledger) -> None:
        self._counter, self.counts, self.client_state = ledger

    def _body(self, path: Path, body: Body) -> Callable[[Index, Loop], Loop]:
        def run(t: Index, both: Loop) -> Loop:
            ledger, carry = both
            self._restore(ledger)
            new = self._scopes.inside(path, lambda: body(jnp.asarray(t, jnp.int32), carry))
            check_carry(carry, new)
            return self._ledger(), new

        return run
