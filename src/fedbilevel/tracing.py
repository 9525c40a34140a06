"""A federation inside a traced program: shared by the protocol trace and by the simulation.

Call sites of `fed.average` are known by their place in the program (a path of positions within the nested loops), so
that tracing a loop body twice finds the same site. The compiled program counts, per site, how often it was reached and
how often each conditional part travelled; bytes follow from these counts outside, in Python integers.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Array, Key, PyTree

from .compiled import traced
from .errors import InputError, check
from .federation import (
    Client,
    Combine,
    Federation,
    When,
    answer,
    answered,
    check_cohort,
    client_method,
    exchange_key,
    sample_cohort,
)
from .problem import describe

Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a message or reply: its size, and which of the site's flags decides whether it travels (None: always)."""

    label: str
    bytes: int
    flag: int | None


@dataclasses.dataclass(frozen=True)
class Site:
    """One call of `fed.average` in the program: what travels there.

    Attributes:
        path: its place in the program.
        name: the client method.
        message, reply: the structure that both sides know (pytrees of shapes and dtypes; `When` nodes in the message).
        down, up: the parts that travel, with their sizes for one client.
        flags: how many conditional parts there are, down and up.
        cohort: how many clients are asked.
        round: whether it is a round of its own, or asks in the round of the exchange before.
    """

    path: Path
    name: str
    message: PyTree
    reply: PyTree
    down: tuple[Part, ...]
    up: tuple[Part, ...]
    flags: int
    cohort: int
    round: bool = True


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
        return traced(answer, problem, self._algorithm, name, dataclasses.replace(client, problem=None), message)

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


# What Loopback shares --------------------------------------------------------------------------------------------------


def is_static(flag: Any) -> bool:
    """Whether a flag is the Python constant True: the part always travels."""
    return flag is True


def normalise(message: PyTree) -> tuple[PyTree, list[Any]]:
    """Leaves as arrays, absent parts zero; and the flags of the message's `When` parts."""
    flags = []

    def visit(part):
        if not isinstance(part, When):
            return jax.tree.map(_as_array, part)
        flags.append(part.present)
        value = jax.tree.map(jnp.asarray, part.value)
        if is_static(part.present):
            return When(jnp.asarray(True), value)
        present = jnp.asarray(part.present, bool)
        return When(present, jax.tree.map(lambda leaf: jnp.where(present, leaf, jnp.zeros_like(leaf)), value))

    return jax.tree.map(visit, message, is_leaf=lambda part: isinstance(part, When)), flags


def _as_array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)  # the same object: features know x by it


def wanted_flags(replies: Any) -> tuple:
    """The flags of a reply's parts, as a tuple."""
    if replies is True:
        return (True,)
    good = isinstance(replies, tuple) and len(replies) > 0
    check(good, f"replies= is True, or a tuple with one flag per part of the reply; got {replies!r}.")
    return replies


def reply_parts(reply: PyTree, wanted: tuple) -> tuple:
    """The parts of a reply, one per flag."""
    if len(wanted) == 1:
        return (reply,)
    if not (isinstance(reply, tuple) and len(reply) == len(wanted)):
        raise InputError(
            f"replies= has {len(wanted)} flags, but the client's reply is {describe(reply)}: "
            "return a tuple of as many parts."
        )
    return reply


def mask_reply(reply: PyTree, wanted: tuple) -> PyTree:
    """The reply with zeros in place of the parts that did not travel."""
    parts = tuple(
        part if is_static(flag) else jax.tree.map(lambda a, f=flag: jnp.where(f, a, jnp.zeros_like(a)), part)
        for part, flag in zip(reply_parts(reply, wanted), wanted, strict=True)
    )
    return parts[0] if len(wanted) == 1 else parts


def size(tree: PyTree) -> int:
    """Bytes of a pytree of arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def site(
    path: Path, name: str, message: PyTree, reply: PyTree, sent: list, wanted: tuple, cohort: int, counts: bool
) -> Site:
    """What travels at a call site, from the message and one client's reply."""
    shapes = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
    flag = iter(range(len(sent) + len(wanted)))
    number = lambda value: None if is_static(value) else next(flag)
    down = []
    flags = iter(sent)
    for place, part in enumerate(message):
        always = 0
        for piece in jax.tree.leaves(part, is_leaf=lambda p: isinstance(p, When)):
            if isinstance(piece, When):
                down.append(Part(str(place), size(piece.value), number(next(flags))))
            else:
                always += size(piece)
        if always:
            down.append(Part(str(place), always, None))
    up = [
        Part(str(i), size(part), number(f))
        for i, (part, f) in enumerate(zip(reply_parts(reply, wanted), wanted, strict=True))
    ]
    flags = next(flag, len(sent) + len(wanted))
    return Site(path, name, shapes(message), shapes(reply), tuple(down), tuple(up), flags, cohort, counts)


def check_times(times: Any, most: int | None) -> Any:
    """How often a loop runs: never more than `most`; refuses a loop whose number of rounds nothing bounds."""
    if isinstance(times, (int, np.integer)):
        check(times >= 0, f"fed.repeat(times=...) cannot be negative; got {times}.")
        return int(times) if most is None else min(int(times), most)
    if most is None:
        raise InputError("fed.repeat with a drawn number of rounds needs most=, the largest it can be.")
    return jnp.minimum(jnp.asarray(times, jnp.int32), most)


def check_beside(beside: Any, path: Path, sites: dict[Path, Site]) -> None:
    """Refuse an exchange in the round of another where there is none before it (in the same loop)."""
    check(isinstance(beside, bool), f"fed.average(beside=...) is True or False; got {beside!r}.")
    before = max((other for other in sites if other < path), default=())
    shared = before[:-1] == path[:-1] and before != ()
    check(shared or not beside, "fed.average(beside=True) needs an exchange before it, in the same loop.")


def check_given(cohort: Any, clients: int) -> Any:
    """A cohort given by the server program, as an array."""
    if cohort is None:
        return None
    cohort = cohort if getattr(cohort, "dtype", None) == jnp.int32 else jnp.asarray(cohort, jnp.int32)
    good = cohort.ndim == 1 and 1 <= cohort.shape[0] <= clients
    check(
        good,
        f"fed.average(cohort=...) takes the indices of 1 to {clients} clients, as from fed.draw_cohort(); "
        f"got an array of shape {cohort.shape}.",
    )
    return cohort


def check_carry(before: PyTree, after: PyTree) -> None:
    """Refuse a loop body that changes the carry's structure, shapes or dtypes."""
    if not alike(before, after):
        raise InputError(
            f"the body of a loop must return a carry like the one it was given, {describe(before)}; "
            f"it returned {describe(after)}."
        )


def alike(one: PyTree, other: PyTree) -> bool:
    """Whether two pytrees of arrays, or of their shapes, have one structure, shapes and dtypes."""
    (leaves, structure), (others, theirs) = jax.tree.flatten(one), jax.tree.flatten(other)
    signature = lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf))
    return structure == theirs and all(signature(a) == signature(b) for a, b in zip(leaves, others, strict=True))
