"""Who races: `tune`'s own candidates, or the user's; and in what words they travel, where sites make them too."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from .. import errors
from ..algorithm import Algorithm, Setting, Truncation
from ..algorithms import ALGORITHMS
from ..algorithms.lockstep import Lockstep
from ..algorithms.simfbo import SimFBO
from ..beginning import as_leaves
from ..cohorts import check_cohort
from ..component import title_of
from ..data import FederatedData
from ..engines.base import Engine
from ..given import Whole, whole_number
from ..pace.automatic import Auto, numbered, ready
from ..problem import Problem
from ..protocol import Protocol, protocol
from ..race.family import Family
from ..race.heats import Candidate, most_candidates
from ..race.racing import Race
from ..settings import algorithm_class, name_of

MOST = 8  # candidates
_TEMPOS = (1.0, 0.5)  # of steps of x as they are found: one in a hurry leads at first, and leaves y behind
_OWN = ""  # in words, the application's own algorithm


class Entrant(NamedTuple):
    """A candidate before the race, and what runs.

    Attributes:
        tempo: None for an algorithm of the user's own, which is as it is.
    """

    candidate: Candidate
    algorithm: Algorithm
    tempo: float | None


def lineup(
    problem: Problem, data: FederatedData, x: PyTree, y: PyTree, engine: Engine, rounds: int, purse: int | None, *,
    algorithms: Sequence[Algorithm] | None, candidates: int | None, batch_size: Whole | None,
) -> tuple[list[Entrant], int]:  # fmt: skip
    """(Those who race in so many rounds, the rounds of an iteration of theirs at most); the rest as `tune` takes it.

    Raises:
        InputError: they cannot race, or rounds or bytes are too few for an iteration of the first.
    """
    cohort = check_cohort(engine.cohort, data.clients)
    found = entrants(data, cohort, algorithms, candidates, batch_size)
    protocols = [protocol(each.algorithm, problem, data, x, y, engine) for each in found]
    _check_least(protocols[0], rounds, purse)
    many = most_candidates(len(found), rounds, max(each.rounds_most for each in protocols))
    if candidates is not None and many < candidates:
        errors.warn(f"{rounds} rounds are few: {many} of {candidates} candidates race in them.")
    return found[:many], max(each.rounds_most for each in protocols[:many])


def entrants(
    data: FederatedData, cohort: int, algorithms: Sequence[Algorithm] | None, many: int | None,
    batch_size: Whole | None,
) -> list[Entrant]:  # fmt: skip
    """All candidates that are asked for, the first so many of them."""
    if algorithms is not None:
        errors.check(
            batch_size is None, "batch_size= goes with the candidates of tune's own: give it to each algorithm."
        )
        good = isinstance(algorithms, Sequence) and len(algorithms) > 0
        good = good and all(isinstance(each, Algorithm) for each in algorithms)
        errors.check(
            good, f"algorithms= is a list of algorithms, such as [fb.Lockstep(), fb.AggITD()]; got {algorithms!r}."
        )
        found = [Entrant(_candidate(_shown(each), each, 1.0), each, None) for each in algorithms]
        errors.check(many is None or many <= len(found), f"candidates={many}, and algorithms= has {len(found)}.")
        found = found[:many]
    else:
        found = _usual(data, cohort, batch_size)
        errors.check(
            many is None or many <= len(found), f"candidates= is a whole number from 1 to {len(found)}; got {many}."
        )
        found = found[:many]
    errors.check(len(found) <= MOST, f"at most {MOST} candidates race; got {len(found)}.")
    for each in found:
        errors.check(
            getattr(each.algorithm, "own_lower", None) is None,
            f"{title_of(each.algorithm)} cannot race: its clients have a y of their own. Run it by solve.",
        )
    return found


def _usual(data: FederatedData, cohort: int, batch_size: Whole | None) -> list[Entrant]:
    """Those of tune's own, in the order in which they are taken."""
    everyone = cohort == data.clients
    size = None if batch_size is None else whole_number(batch_size, 1, "batch_size= is a whole number of at least 1")
    lockstep, simfbo = Lockstep(batch_size=size), SimFBO(batch_size=size)
    both = everyone or data.weights is None  # what Lockstep asks for
    names: dict[str, Algorithm] = {"lockstep": lockstep, "simfbo": simfbo} if both else {"simfbo": simfbo}
    order = [(name, tempo) for tempo in _TEMPOS for name in names]
    of = lambda name, tempo: name if tempo == 1 else f"{name}, x {tempo:g} times"
    return [Entrant(_candidate(of(n, t), names[n], t), names[n], t) for n, t in order]


def _candidate(name: str, algorithm: Algorithm, tempo: float) -> Candidate:
    return Candidate(name, title_of(algorithm), tempo)


def _shown(algorithm: Algorithm) -> str:
    """An algorithm as its user wrote it: with what differs from the defaults."""
    fields = dataclasses.fields(algorithm)
    given = [f"{f.name}={getattr(algorithm, f.name)!r}" for f in fields if getattr(algorithm, f.name) != f.default]
    return f"{title_of(algorithm)}({', '.join(given)})"


def starting(entrants: Sequence[Entrant], x: PyTree) -> tuple[Algorithm, list[Candidate]]:
    """(The race, or what runs where there is but one; the candidates in the race's order).

    Args:
        x: the upper variable's trainable part.
    """
    if len(entrants) == 1:
        return entrants[0].algorithm, [entrants[0].candidate]
    groups: dict[Hashable, list[tuple[Entrant, Algorithm]]] = {}
    for each in entrants:
        running = ready(each.algorithm, x)
        if isinstance(running, Auto) and each.tempo is not None:
            running = dataclasses.replace(running, tempo=each.tempo)
        running = as_leaves(running)
        groups.setdefault((type(numbered(running)), jax.tree.structure(running)), []).append((each, running))
    titles = [title_of(own[0][1]).lower() for own in groups.values()]
    names = [title if titles.count(title) == 1 else f"{title}-{k}" for k, title in enumerate(titles)]
    families = [Family.of(name, [one for _, one in own]) for name, own in zip(names, groups.values(), strict=True)]
    return Race(tuple(families)), [each.candidate for own in groups.values() for each, _ in own]


# In words -----------------------------------------------------------------------------------------------------------------


def in_words(algorithm: Algorithm, own: Algorithm) -> tuple[str, dict[str, Setting]]:
    """(Its name on the command line, "" for the application's own; the settings in which it differs from that).

    Raises:
        InputError: a setting is none that can be written in a line.
    """
    same, given = type(algorithm) is type(own), {}
    for field in dataclasses.fields(algorithm):
        value, usual = getattr(algorithm, field.name), getattr(own, field.name) if same else field.default
        worded, before = _worded(value), _worded(usual)
        if value is usual or (_plain(worded) and _plain(before) and worded == before):
            continue
        what = f"{title_of(algorithm)} has {field.name}={value!r}"
        errors.check(_plain(worded), f"over a network a candidate's settings are numbers and words: {what}.")
        given[field.name] = worded
    return (_OWN if same else name_of(type(algorithm))), given


def of_words(kind: str, given: Mapping[str, Setting], own: Algorithm) -> Algorithm:
    """The algorithm that `in_words` tells of.

    Raises:
        InputError: there is none of that name, or it has no such settings.
    """
    fields = {field.name for field in dataclasses.fields(own if kind == _OWN else algorithm_class(kind))}
    errors.check(set(given) <= fields, f"{kind or title_of(own)} has no settings {sorted(set(given) - fields)}.")
    return dataclasses.replace(own, **given) if kind == _OWN else ALGORITHMS[kind](**given)


def _worded(value: object) -> object:
    """A truncation as its user wrote it; anything else as it is."""
    if isinstance(value, Truncation):
        return value.value if value.mode == "fixed" else value.mode
    return value


def _plain(value: object) -> bool:
    several = isinstance(value, tuple) and all(isinstance(each, int) for each in value)
    return several or value is None or isinstance(value, (bool, int, float, str))


def _check_least(first: Protocol, rounds: int, purse: int | None) -> None:
    """Refuse a budget of less than an iteration."""
    errors.check(
        rounds >= first.rounds_most,
        f"rounds={rounds} is too few: one iteration of {first.algorithm} takes {first.rounds_most}. Give at least so many.",
    )
    least = first.bytes_down_most + first.bytes_up_most
    errors.check(
        purse is None or purse >= least,
        f"max_bytes={purse} is too few: one iteration of {first.algorithm} takes {least:,}. Give at least so many.",
    )
