"""What an algorithm sees of `fed` where the outer loss is one of means: they travel along."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from ..algorithm import Algorithm
from ..component import MethodOf, path_of
from ..federation import Body, Cohort, Combine, Federation, Flag, Index, Method, Replies, Share
from .running import Running
from .seen import Told

DRY = "means"  # before a method's name: what it would ask of the outer loss, and nothing else


class Carrying(Federation):
    """What an algorithm sees: exchanges that use the outer loss are sent the means, and bring the clients' own.

    Args:
        owner: whom engines know, for the algorithm.
        uses: the client methods that ask for the outer loss, by name; None: any may.
        running: what is known of the means.
        looks: whether the first such exchange that is in no loop is asked for its means beforehand.

    Attributes:
        running: what is known by now.
        told: the methods that were seen to bring means.
    """

    def __init__(
        self,
        fed: Federation,
        owner: Algorithm,
        algorithm: Algorithm,
        uses: tuple[str, ...] | None,
        running: Running,
        looks: bool = False,
    ):
        self.clients, self.cohort_size, self.weighted = fed.clients, fed.cohort_size, fed.weighted
        self.running, self.told = running, set[str]()
        self._fed, self._owner, self._algorithm, self._uses = fed, owner, algorithm, uses
        self._looks, self._depth = looks, 0
        self._round = running  # what was known when the round began: an exchange beside another knows no more

    @property
    def share(self) -> float | Array:
        return self._fed.share

    @property
    def _share(self) -> Share:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._fed._share

    @property
    def _asked(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._fed._asked

    def ask(
        self, method: Method, message: tuple, combine: Combine, replies: Replies, cohort: Cohort, beside: bool
    ) -> PyTree:
        path = path_of(getattr(method, "__self__", None), self._algorithm)
        if path is None:  # none of the algorithm's: it is refused
            return self._fed.ask(method, message, combine, replies, cohort, beside)
        name = f"{path}{getattr(method, '__name__', '')}"
        named = lambda name: MethodOf(self._owner, name)
        if not beside:
            self._round = self.running
        if self._uses is not None and name not in self._uses:
            return self._fed.ask(named(name), message, combine, replies, cohort, beside)
        wanted, ways = _parts(replies, combine)
        if self._looks and self._depth == 0:
            self._looks = False
            some = (True,) * len(
                wanted
            )  # as many parts, all but the first empty: the method may look at what is wanted
            here = self._fed.ask(named(f"{DRY}.{name}"), (self.running.means, *message), "mean", some, cohort, False)
            self._renew(here if len(wanted) == 1 else here[0], True)
            self._round = self.running
        travels = _any(wanted)
        known = self._round.means
        sent = known if travels is True else self._fed.when(travels, known)
        mixed = "mean" if set(ways) == {"mean"} else (*ways, "mean")
        out = self._fed.ask(named(name), (sent, *message), mixed, (*wanted, travels), cohort, beside)
        *parts, brought = out
        if brought is not None:
            self.told.add(name)
            self._renew(brought, travels)
        return parts[0] if len(wanted) == 1 else tuple(parts)

    def _renew(self, brought: Told, travels: Flag) -> None:
        travels = travels if travels is True else jnp.asarray(travels, bool)
        share: Share = self._fed._share
        if share is None:  # a cohort drawn in proportion to unequal weights
            share = self._fed._asked / self.clients
        self.running = self.running.renewed(brought.means, share, brought.sampled, travels)

    # Loops, through which what is known goes along ------------------------------------------------------------------

    def _looped(self, body: Body, single: bool, loop: Callable[[Body, PyTree], PyTree], carry: PyTree) -> PyTree:
        """A loop; in one of a single turn an exchange may be in the round of the one before the loop."""
        began = self._round

        def turn(t: Int[Array, ""], both: tuple[Running, PyTree]) -> tuple[Running, PyTree]:
            self.running, carry = both
            self._round, self._depth = began if single else self.running, self._depth + 1
            try:
                carry = body(t, carry)
                return self.running, carry
            finally:
                self._depth -= 1

        self.running, carry = loop(turn, (self.running, carry))
        self._round = began if single else self.running
        return carry

    def repeat(self, times: Index, body: Body, carry: PyTree, most: int | None = None) -> PyTree:
        single = most == 1 or (isinstance(times, int) and times == 1)
        return self._looped(body, single, lambda turn, both: self._fed.repeat(times, turn, both, most), carry)

    def rarely(self, times: Index, body: Body, carry: PyTree, most: int = 1) -> PyTree:
        return self._looped(body, most == 1, lambda turn, both: self._fed.rarely(times, turn, both, most), carry)

    def until(self, condition: Callable[[PyTree], Flag], body: Body, carry: PyTree, most: int) -> PyTree:
        going = lambda turn, both: self._fed.until(lambda both: condition(both[1]), turn, both, most)
        return self._looped(body, False, going, carry)

    def randint(self, low: int, high: int) -> Int[Array, ""]:
        return self._fed.randint(low, high)

    def draw_cohort(self, size: int | None = None) -> Int[Array, " cohort"]:
        return self._fed.draw_cohort(size)


def _parts(replies: Replies, combine: Combine) -> tuple[tuple[Flag, ...], tuple]:
    """(A flag for each part of a reply, how each is combined), as they mean."""
    wanted = replies if isinstance(replies, tuple) else (replies,)
    if isinstance(combine, tuple):
        return (wanted * len(combine) if replies is True else wanted), combine
    return wanted, (combine,) * len(wanted)


def _any(flags: tuple[Flag, ...]) -> Flag:
    """Whether any part of the reply travels: the clients' means go with it."""
    if any(flag is True for flag in flags):
        return True
    whole = jnp.asarray(flags[0], bool)
    for flag in flags[1:]:
        whole = whole | jnp.asarray(flag, bool)
    return whole
