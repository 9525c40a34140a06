"""Algorithms that advance in the same rounds: `Race`.

Each family is one algorithm with several settings. In an iteration of the race each takes one of its own; what they ask of
the clients at the same time travels in ONE message, and so do the replies. Where one takes more rounds than another whose
iteration is a single round, that one goes along in all of them, loops of rounds included: a race has as many rounds as the
longest, and the bytes of all. Exchanges that cannot be shared (with clients of an algorithm's own choice; two algorithms'
loops of rounds) take turns, and each round counts.

A setting that blows up stays where it was, and is out. The race's own x and y are those of its first setting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from .. import owned
from ..algorithm import Algorithm, State
from ..component import MethodOf, method_named, title_of
from ..errors import check
from ..federation import Client, Federation, Method, Reply, Way, When
from .family import Family, where
from .lanes import Lane, Rider, own_step
from .playing import Answer, Asked, Drawn, Ended, Looped

_FAR = 1e9  # how far beyond the start's size a setting counts as blown up


class Standing(State):
    """Where a race is.

    Attributes:
        members: each family's states, with the axis of settings in front.
        alive: each family's, whether a setting has not blown up.
        limit: how large a number may be.
    """

    members: tuple
    alive: tuple[Bool[Array, " settings"], ...]
    limit: Float[Array, ""]


@final
class Race(Algorithm):
    """See the head of this file.

    Args:
        families: the first setting of the first one is the leader.
    """

    several: ClassVar[bool] = True  # and each is somewhere else

    families: tuple[Family, ...]

    @property
    def title(self) -> str:
        """What it is called: by its leader's class."""
        return title_of(self.families[0].algorithm)

    @property
    def size(self) -> int:
        """How many settings race."""
        return sum(family.size for family in self.families)

    def place(self, k: int) -> tuple[int, int]:
        """(Family, place in it) of the k-th setting of all."""
        for place, family in enumerate(self.families):
            if k < family.size:
                return place, k
            k -= family.size
        raise IndexError(k)

    @staticmethod
    def groups(places: Sequence[tuple[int, int]]) -> list[tuple[int, list[int]]]:
        """[(family, places in it)], in the order in which they are given."""
        families = dict.fromkeys(family for family, _ in places)
        return [(each, [k for family, k in places if family == each]) for each in families]

    def in_order(self, several: Sequence[int]) -> list[int]:
        """Some of all settings, in the order of the race of them."""
        groups = self.groups([self.place(k) for k in several])
        before = [sum(family.size for family in self.families[:place]) for place in range(len(self.families))]
        return [before[family] + k for family, own in groups for k in own]

    def only(self, places: Sequence[tuple[int, int]]) -> Algorithm:
        """The race of some settings, the first of which leads; of one, its algorithm as it runs alone."""
        if len(places) == 1:
            return self.families[places[0][0]].one(places[0][1])
        return Race(tuple(self.families[family].only(own) for family, own in self.groups(places)))

    def init(self, x: PyTree, y: PyTree) -> Standing:
        check(
            not owned.nodes((x, y)),
            "candidates that race take no leaves per client (fedbilevel.per_client): run one algorithm instead, such as "
            "fedbilevel.solve with Lockstep(), whose steps are found while it runs.",
        )
        members = tuple(family.each(lambda algorithm: algorithm.init(x, y)) for family in self.families)
        alive = tuple(jnp.ones(family.size, bool) for family in self.families)
        largest = [jnp.max(jnp.abs(leaf), initial=1.0) for leaf in jax.tree.leaves((x, y))]
        return Standing(x, y, members, alive, _FAR * jnp.max(jnp.stack([size.astype(float) for size in largest])))

    def begun_again(self, state: Standing) -> Standing:
        """Each from where it is; who has blown up stays out."""
        again = lambda algorithm, member: algorithm.begun_again(member)
        members = tuple(family.each(again, member) for family, member in zip(self.families, state.members, strict=True))
        return dataclasses.replace(state, members=members)

    def client_init(self, x: PyTree, y: PyTree) -> PyTree:
        states = tuple(family.each(lambda algorithm: algorithm.client_init(x, y)) for family in self.families)
        return states if jax.tree.leaves(states) else None

    def step(self, fed: Federation, state: Standing) -> tuple[Standing, PyTree]:
        lanes = [
            Lane(own_step, family, (family.algorithm, member), fed)
            for family, member in zip(self.families, state.members, strict=True)
        ]
        riders = [Rider(lane, alive, state.limit) for lane, alive in zip(lanes, state.alive, strict=True)]
        self._together(fed, lanes, riders)
        members, alive = tuple(rider.state for rider in riders), tuple(rider.alive for rider in riders)
        lane = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
        leader, info = lane(members[0]), lane(riders[0].info)
        return Standing(leader.x, leader.y, members, alive, state.limit), info

    # What several ask at once -----------------------------------------------------------------------------------------

    def _together(self, fed: Federation, lanes: list[Lane], riders: list[Rider]) -> None:
        """Play all lanes to their ends; riders go along in every round of theirs, an iteration each."""
        while open_ones := [lane for lane in lanes if not isinstance(lane.event, Ended)]:
            drawing = [lane for lane in open_ones if isinstance(lane.event, Drawn)]
            rare = [lane for lane in open_ones if isinstance(lane.event, Looped) and lane.event.kind == "rarely"]
            asking = [lane for lane in open_ones if isinstance(lane.event, Asked)]
            if drawing:
                for lane in drawing:
                    lane.draw(fed)
            elif rare:
                self._loop(fed, rare, [])
            elif asking and (looping := [lane for lane in open_ones if lane.turns]):
                self._first_turn(fed, looping[0], asking, riders)
            elif asking:
                self._round(fed, _alike(asking, fed.cohort_size), [rider for rider in riders if rider.rides])
            else:
                self._loop(fed, open_ones[:1], [rider for rider in riders if rider.rides])
            for rider in riders:
                rider.arrived()

    def _first_turn(self, fed: Federation, looping: Lane, asking: list[Lane], riders: list[Rider]) -> None:
        """The first turn of a loop by itself, so that what others ask at that time goes along."""
        inside = looping.inside(jnp.zeros((), jnp.int32), looping.looped.carry)
        self._together(fed, [inside, *asking], riders)
        looping.turned(inside.end)

    def _round(self, fed: Federation, lanes: list[Lane], riders: list[Rider]) -> None:
        """One exchange of these lanes, and a whole iteration of those that go along."""
        asked = lanes[0].asked
        usual = not asked.beside and _size(asked, fed.cohort_size) == fed.cohort_size
        going = [rider.again(fed) for rider in riders] if usual else []
        self._ask(fed, [*lanes, *going])
        self._together(fed, going, [])
        for rider, lane in zip(riders, going, strict=False):
            rider.take(lane.end)

    def _loop(self, fed: Federation, lanes: list[Lane], riders: list[Rider]) -> None:
        """A loop of rounds, of several lanes at once where it is a rare one."""
        loops = [lane.looped for lane in lanes]
        kind, most = loops[0].kind, max((loop.most or 0 for loop in loops), default=0) or None

        def turn(t: Array, both: tuple[tuple, tuple]) -> tuple[tuple, tuple]:
            carries, along = both
            inside = [lane.inside(t, carry) for lane, carry in zip(lanes, carries, strict=True)]
            for rider, held in zip(riders, along, strict=True):
                rider.held = held
            self._together(fed, inside, riders)
            of = zip(loops, lanes, inside, carries, strict=True)
            ends = tuple(where(_goes_on(loop, lane, t, old), turned.end, old) for loop, lane, turned, old in of)
            return ends, tuple(rider.held for rider in riders)

        start = tuple(loop.carry for loop in loops), tuple(rider.held for rider in riders)
        times = _most([loop.times for loop in loops])
        if kind == "rarely":
            ends, along = fed.rarely(times, turn, start, most or 1)
        elif kind == "repeat":
            ends, along = fed.repeat(times, turn, start, most)
        else:
            done = lambda both: ~jnp.any(_goes_on(loops[0], lanes[0], jnp.zeros((), jnp.int32), both[0][0]))
            ends, along = fed.until(done, turn, start, most or 1)
        for lane, end in zip(lanes, ends, strict=True):
            lane.go_on(Answer(end))
        for rider, held in zip(riders, along, strict=True):
            rider.held = held

    def _ask(self, fed: Federation, lanes: list[Lane]) -> None:
        """One exchange, of all these lanes."""
        events = [lane.asked for lane in lanes]
        names = [
            f"{lane.family.name}.{each.name}:{len(each.message)}:{len(each.replies)}"
            for lane, each in zip(lanes, events, strict=True)
        ]
        message = tuple(_whole(part) for each in events for part in each.message)
        flags = tuple(flag for each in events for flag in each.replies)
        ways: tuple[Way, ...] = tuple(way for each in events for way in _ways(each))
        method = MethodOf(self, "+".join(names))
        out = fed.ask(method, message, ways, flags, events[0].cohort, events[0].beside)
        parts = [out] if len(flags) == 1 else list(out)
        for lane, each in zip(lanes, events, strict=True):
            own, parts = parts[: len(each.replies)], parts[len(each.replies) :]
            lane.go_on(Answer(own[0] if len(own) == 1 else tuple(own), fed._share))

    # Client methods ---------------------------------------------------------------------------------------------------

    def client_method(self, name: str) -> Method:
        """Several families' at once, by a name such as "lockstep.moves:5:2+simfbo.moves:4:1".

        Each is "family.method:parts of its message:parts of its reply".
        """
        if name.startswith("_") or "." not in name:
            raise AttributeError(name)
        pieces = []
        for piece in name.split("+"):
            path, sent, told = piece.split(":")
            label, _, method = path.partition(".")
            place = next(k for k, family in enumerate(self.families) if family.name == label)
            pieces.append((place, method, int(sent), int(told)))

        def together(client: Client, *message: PyTree) -> PyTree:
            states = list(client.state) if client.state is not None else [None] * len(self.families)
            replies, renewed, rest, wanted = [], False, list(message), list(client.wanted)
            for place, method, sent, told in pieces:
                own, rest = rest[:sent], rest[sent:]
                flags, wanted = tuple(wanted[:told]), wanted[told:]
                out = self._answered(client, place, method, own, flags, states[place])
                if isinstance(out, Reply):
                    states[place], out, renewed = out.state, out.reply, True
                replies += [out] if told == 1 else list(out)
            reply = replies[0] if len(replies) == 1 else tuple(replies)
            return Reply(reply, tuple(states)) if renewed else reply

        return together

    def _answered(
        self, client: Client, place: int, method: str, message: list[PyTree], wanted: tuple, state: PyTree
    ) -> PyTree:
        """What all settings of a family answer."""
        family = self.families[place]
        flags, values = eqx.partition(message, jax.tree.map(_flags, message, is_leaf=_is_when))

        def one(algorithm: Algorithm, state: PyTree, values: PyTree) -> PyTree:
            own = dataclasses.replace(client, state=state, wanted=wanted)
            return method_named(algorithm, method)(own, *eqx.combine(values, flags))

        return family.each(one, state, values)


def _alike(lanes: list[Lane], size: int) -> list[Lane]:
    """Those whose exchanges can be one: all that ask a fresh cohort, and one that asks clients of its own choice, as many.

    What goes beside the exchange before comes first.
    """
    beside = [lane for lane in lanes if lane.asked.beside]
    several = beside or lanes
    fresh = [lane for lane in several if lane.asked.cohort is None]
    chosen = [lane for lane in several if lane.asked.cohort is not None]
    fitting = [lane for lane in chosen if not beside and _size(lane.asked, size) == size]
    return [*fitting[:1], *fresh] or chosen[:1]


def _size(asked: Asked, usual: int) -> int:
    """How many clients an exchange asks."""
    return usual if asked.cohort is None else jnp.shape(asked.cohort)[0]


def _goes_on(loop: Looped, lane: Lane, t: Array, carry: PyTree) -> Bool[Array, " settings"]:
    """Whether a turn of the loop counts, for each setting."""
    if loop.kind == "until":
        return ~lane.inside(t, carry, condition=True).end
    return jnp.broadcast_to(t < jnp.asarray(loop.times), (lane.family.size,))


def _most(times: list) -> int | Array:
    whole = [each for each in times if isinstance(each, int)]
    if len(whole) == len(times):
        return max(whole)
    return jnp.max(jnp.stack([jnp.max(jnp.asarray(each)) for each in times]))


def _ways(event: Asked) -> tuple[Way, ...]:
    return event.ways if isinstance(event.ways, tuple) else (event.ways,) * len(event.replies)


def _is_when(part: PyTree) -> bool:
    return isinstance(part, When)


def _flags(part: PyTree) -> PyTree:
    """Which leaf of a part of a message is its flag."""
    return When(True, jax.tree.map(lambda _: False, part.value)) if _is_when(part) else False


def _whole(part: PyTree) -> PyTree:
    """A part of a message with one flag for all settings."""
    one = lambda each: (
        When(jnp.any(each.present), each.value) if _is_when(each) and eqx.is_array(each.present) else each
    )
    return jax.tree.map(one, part, is_leaf=_is_when)
