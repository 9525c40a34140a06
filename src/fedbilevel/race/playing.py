"""A server program that is played up to the next thing that it asks of `fed`.

Programs that share their rounds must each stop where they communicate. A server program is a function of its state and of
the answers it gets: so it is run from its beginning with the answers that it has had so far, up to what it asks next, and
stopped there. All is traced, and what was computed before is computed once. Several settings of one program are played side
by side (a vmap); what they ask is asked with an axis of settings in front.

A loop of rounds is asked for as a whole. One turn of it is played by answering `Turn`: the program is run up to the loop,
and then its body, up to what that asks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from ..algorithm import Algorithm
from ..federation import Body, Cohort, Combine, Federation, Flag, Index, Method, Replies, Share
from ..pace.automatic import numbered
from ..protocol.calls import check_times, client_method
from ..protocol.sites import parts_wanted


class Asked(eqx.Module):
    """An exchange. Arrays of the message have the axis of settings in front.

    Attributes:
        name: the client method's path in the algorithm.
        replies: one flag for each part of the reply.
        ways: how each is combined.
    """

    name: str = eqx.field(static=True)
    message: tuple
    replies: tuple[Flag, ...]
    ways: Combine = eqx.field(static=True)
    cohort: Cohort
    beside: bool = eqx.field(static=True)


class Looped(eqx.Module):
    """A loop of rounds.

    Attributes:
        times: how often, at most.
        most: a bound of that.
        carry: before the first turn.
    """

    kind: Literal["repeat", "rarely", "until"] = eqx.field(static=True)
    times: Index
    most: int | None = eqx.field(static=True)
    carry: PyTree


class Drawn(eqx.Module):
    """A number, in {low, ..., high - 1}, or a cohort, of `size` clients."""

    what: Literal["number", "cohort"] = eqx.field(static=True)
    low: int = eqx.field(static=True, default=0)
    high: int = eqx.field(static=True, default=0)
    size: int | None = eqx.field(static=True, default=None)


class Ended(eqx.Module):
    """The end, of the program or of a turn of its loop: what it returned."""

    out: PyTree


Event: TypeAlias = Asked | Looped | Drawn | Ended


class Answer(eqx.Module):
    """What came back. `each`: whether there is one for each setting.

    Attributes:
        share: what `fed.share` is after it.
    """

    value: PyTree
    share: Share = None
    each: bool = eqx.field(static=True, default=True)


class Turn(eqx.Module):
    """One turn of a loop is played, with the answers it has had.

    Attributes:
        carry: for each setting.
        answers: those that its body has had.
        condition: whether it is the loop's condition that is wanted, at `carry`.
    """

    t: Int[Array, ""]
    carry: PyTree
    answers: tuple[Answer | Turn, ...] = ()
    condition: bool = eqx.field(static=True, default=False)


Program: TypeAlias = Callable[..., PyTree]  # (fed, algorithm, state) -> what it returns


class Facts(NamedTuple):
    """What is known of a federation beforehand."""

    clients: int
    cohort_size: int
    weighted: bool


def play(program: Program, fed: Federation, arguments: tuple, answers: tuple[Answer | Turn, ...]) -> Event:
    """What the program asks next.

    What is asked for the same answers is traced once: by the other traces of a program, and where messages are sent, by
    every iteration. (Not so for an algorithm of the user's, whose functions may read what changes.)

    Args:
        fed: the federation that is asked in the end.
        arguments: (algorithm, state), with the axis of settings in front.
    """
    facts = Facts(fed.clients, fed.cohort_size, fed.weighted)
    ours = type(numbered(arguments[0])).__module__.startswith("fedbilevel.")
    return (_played_once if ours else _played)(program, facts, arguments, answers)


def _played(program: Program, facts: Facts, arguments: tuple, answers: tuple[Answer | Turn, ...]) -> Event:
    found: list[PyTree] = []
    stacked, single = eqx.partition(answers, _stacked(answers))

    def one(arguments: tuple, stacked: PyTree) -> PyTree:
        played = Played(facts, owner, eqx.combine(stacked, single))
        try:
            event: Event = Ended(program(played, *arguments))
        except _Stopped as stopped:
            event = stopped.event
        if isinstance(event, Ended):
            event = jax.tree.map(jnp.asarray, event)
        arrays, rest = eqx.partition(event, eqx.is_array)
        found.append(rest)
        return arrays

    owner = arguments[0]
    arrays = jax.vmap(one)(arguments, stacked)
    return _of_all(eqx.combine(arrays, found[0]))


_played_once = eqx.filter_jit(inline=True)(_played)  # pyright: ignore[reportCallIssue]  it takes what `jax.jit` does


def _of_all(event: Event) -> Event:
    """With what all settings have in common once: flags, how often a loop runs, who is asked."""
    any_of = lambda flag: jnp.any(flag) if eqx.is_array(flag) else flag
    if isinstance(event, Asked):
        cohort = None if event.cohort is None else event.cohort[0]
        return Asked(event.name, event.message, tuple(map(any_of, event.replies)), event.ways, cohort, event.beside)
    return event


def _stacked(answers: tuple[Answer | Turn, ...]) -> PyTree:
    """Which of their leaves have the axis of settings."""
    return jax.tree.structure(answers).unflatten([flag for answer in answers for flag in _flags(answer)])


def _flags(answer: Answer | Turn) -> list[bool]:
    count = lambda tree: len(jax.tree.leaves(tree))
    if isinstance(answer, Answer):
        return [answer.each] * count(answer.value) + [False] * count(answer.share)
    inside = [flag for each in answer.answers for flag in _flags(each)]
    return [False] * count(answer.t) + [True] * count(answer.carry) + inside


class _Stopped(Exception):
    """The program has come to what it asks next."""

    def __init__(self, event: Event):
        self.event = event


class Played(Federation):
    """What a program that is played sees."""

    def __init__(self, facts: Facts, owner: Algorithm, answers: tuple[Answer | Turn, ...]):
        self.clients, self.cohort_size, self.weighted = facts
        self._owner, self._answers, self._next, self._share = owner, answers, 0, None

    def _answered(self, event: Event) -> Answer | Turn:
        if self._next == len(self._answers):
            raise _Stopped(event)
        self._next += 1
        return self._answers[self._next - 1]

    def ask(
        self, method: Method, message: tuple, combine: Combine, replies: Replies, cohort: Cohort, beside: bool
    ) -> PyTree:
        name, _ = client_method(self._owner, method)
        wanted, ways = parts_wanted(replies, combine)
        answer = self._answered(Asked(name, message, wanted, ways, cohort, beside))
        assert isinstance(answer, Answer)
        self._share = answer.share
        return answer.value

    def repeat(self, times: Index, body: Body, carry: PyTree, most: int | None = None) -> PyTree:
        return self._looped(Looped("repeat", check_times(times, most), most, carry), body)

    def rarely(self, times: Index, body: Body, carry: PyTree, most: int = 1) -> PyTree:
        return self._looped(Looped("rarely", check_times(times, most), most, carry), body)

    def until(self, condition: Callable[[PyTree], Flag], body: Body, carry: PyTree, most: int) -> PyTree:
        return self._looped(Looped("until", most, most, carry), body, condition)

    def _looped(self, loop: Looped, body: Body, condition: Callable[[PyTree], Flag] | None = None) -> PyTree:
        answer = self._answered(loop)
        if isinstance(answer, Answer):
            return answer.value
        if answer.condition:
            assert condition is not None
            raise _Stopped(Ended(condition(answer.carry)))
        self._answers, self._next = answer.answers, 0
        raise _Stopped(Ended(body(answer.t, answer.carry)))

    def randint(self, low: int, high: int) -> Int[Array, ""]:
        return self._of_value(Drawn("number", low, high))

    def draw_cohort(self, size: int | None = None) -> Int[Array, " cohort"]:
        return self._of_value(Drawn("cohort", size=size))

    def _of_value(self, event: Drawn) -> Array:
        answer = self._answered(event)
        assert isinstance(answer, Answer)
        return answer.value
