"""Where a family stands within an iteration of a race: on its own way (`Lane`), and along in others' rounds (`Rider`)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ..algorithm import Algorithm
from ..engines.base import within
from ..federation import Federation
from ..pace.automatic import Auto
from .family import Family, where
from .playing import Answer, Asked, Drawn, Ended, Event, Looped, Program, Turn, play


def own_step(fed: Federation, algorithm: Algorithm, state: PyTree) -> tuple[PyTree, PyTree]:
    """An iteration of one setting."""
    return algorithm.step(fed, state)


class Lane:
    """A family on its way through an iteration, or through a turn of a loop in it.

    Attributes:
        event: what it asks next, or its end.
    """

    def __init__(
        self, program: Program, family: Family, arguments: tuple, fed: Federation,
        turns: tuple[tuple[tuple[Answer | Turn, ...], Turn], ...] = (),
    ):  # fmt: skip
        self.family, self._program, self._arguments, self._fed = family, program, arguments, fed
        self._turns = turns  # from the outermost: (the answers up to the loop, the turn)
        self._answers: tuple[Answer | Turn, ...] = ()
        self._rounds, self._done = 0, 0  # turns of the loop that it has come to
        self.event = self._played()

    def _played(self) -> Event:
        whole = self._answers
        for before, turn in reversed(self._turns):
            whole = (*before, dataclasses.replace(turn, answers=whole))
        return play(self._program, self._fed, self._arguments, whole)

    @property
    def asked(self) -> Asked:
        """The exchange that it asks for."""
        assert isinstance(self.event, Asked)
        return self.event

    @property
    def end(self) -> PyTree:
        """What it returned."""
        assert isinstance(self.event, Ended)
        return self.event.out

    def go_on(self, answer: Answer) -> None:
        """With an answer to what it asked."""
        several = isinstance(self.event, Looped) and self.event.kind != "rarely"
        self._rounds += 2 * several + (isinstance(self.event, Asked) and not self.event.beside)
        self._answers, self._done = (*self._answers, answer), 0
        self.event = self._played()

    @property
    def single(self) -> bool:
        """Whether what it has played is one exchange, and what measures."""
        return self._rounds == 1 and not any(isinstance(each, Answer) and not each.each for each in self._answers)

    @property
    def state(self) -> PyTree:
        """From where it began."""
        return self._arguments[1]

    @property
    def looped(self) -> Looped:
        """The loop that it asks for."""
        assert isinstance(self.event, Looped)
        return self.event

    @property
    def turns(self) -> int:
        """How many turns it asks for, where that is certain and they are rounds of every iteration; else none."""
        loop = self.event
        certain = isinstance(loop, Looped) and loop.kind == "repeat" and isinstance(loop.times, int)
        return int(loop.times) if isinstance(loop, Looped) and certain else 0

    def turned(self, carry: PyTree) -> None:
        """The first turn that it asks for is done."""
        loop = self.looped
        if self.turns == 1:
            self.go_on(Answer(carry))
            return
        self._done += 1
        self.event = Looped(loop.kind, self.turns - 1, loop.most, carry)

    def draw(self, fed: Federation) -> None:
        """Draw what it asks for, once for all its settings."""
        assert isinstance(self.event, Drawn)
        of_number = self.event.what == "number"
        drawn = fed.randint(self.event.low, self.event.high) if of_number else fed.draw_cohort(self.event.size)
        self.go_on(Answer(drawn, each=False))

    def inside(self, t: Array, carry: PyTree, condition: bool = False) -> Lane:
        """One turn of the loop that it has come to."""
        turn = self._answers, Turn(t + self._done, carry, condition=condition)
        return Lane(self._program, self.family, self._arguments, self._fed, (*self._turns, turn))


class Rider:
    """Where a family stands in an iteration of the race: once its own is over, it may go along in others' rounds.

    So does one whose iteration is a single round. One of several waits until the longest is done.

    Attributes:
        state, alive, info: after its last iteration; of a setting that blew up, before it did.
    """

    def __init__(self, lane: Lane, alive: Bool[Array, " settings"], limit: Float[Array, ""]):
        self._lane, self._family, self._limit, self._over = lane, lane.family, limit, False
        self.state, self.alive, self.info = lane.state, alive, None

    @property
    def rides(self) -> bool:
        """Whether it can go along."""
        return self._over and self._lane.single

    @property
    def held(self) -> tuple:
        """What a loop of others' rounds carries of it."""
        return self.state, self.alive, self.info

    @held.setter
    def held(self, held: tuple) -> None:
        self.state, self.alive, self.info = held

    def arrived(self) -> None:
        """Take what its own lane has come to, if it has."""
        if not self._over and isinstance(self._lane.event, Ended):
            self._over = True
            self.take(self._lane.end)

    def take(self, end: tuple[PyTree, PyTree]) -> None:
        """An iteration's end: what has blown up stays where it was."""
        state, info = end
        self.alive = self.alive & jax.vmap(lambda state, info: within(state, info, self._limit))(state, info)
        none = jax.tree.map(jnp.zeros_like, info) if self.info is None else self.info
        self.state, self.info = where(self.alive, state, self.state), where(self.alive, info, none)

    def again(self, fed: Federation) -> Lane:
        """Another iteration of its own."""
        algorithm = self._family.algorithm
        algorithm = dataclasses.replace(algorithm, first=0) if isinstance(algorithm, Auto) else algorithm
        return Lane(own_step, self._family, (algorithm, self.state), fed)
