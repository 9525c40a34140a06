"""Settings of algorithms: the best known ones, and `name=value` words parsed by a field's type; where steps come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from . import store
from .algorithm import Algorithm, Setting
from .algorithms import ALGORITHMS
from .errors import InputError, check, unknown_name
from .pace.automatic import STEPS as FOUND

STEPS = tuple(FOUND)  # the three step sizes, of which an algorithm has those that it needs
UNTUNED = "auto"  # of step sizes that nobody has chosen: they are found while an algorithm runs, but for a few
DEFAULTS = "class defaults"  # where none of them is found
_SOURCES = {"library": "stored", "search": "stored by search"}


@dataclasses.dataclass(frozen=True)
class Chosen:
    """An algorithm with its settings.

    Attributes:
        algorithm: it.
        steps: where its step sizes come from, in words: "given", "stored", "stored by search", "auto", "the
            app's own", "class defaults" where none can be found; with what was given beside, as in
            "stored, outer_lr given" or "stored, outer_lr auto".
    """

    algorithm: Algorithm
    steps: str


def algorithm_class(name: str) -> type[Algorithm]:
    """The algorithm of that command-line name."""
    if name not in ALGORITHMS:
        raise unknown_name("algorithm", name, ALGORITHMS)
    return ALGORITHMS[name]


def name_of(kind: type[Algorithm]) -> str:
    """An algorithm's name on the command line; that of its class where it is none of ours."""
    named = (name for name, ours in ALGORITHMS.items() if ours is kind)
    return next(named, kind.__name__.lower())


def best(task: str, dataset: str, algorithm: str) -> dict[str, Setting]:
    """The best known settings of (task, data set, algorithm); {} where there are none."""
    entry = store.known(task, dataset, algorithm)
    return {} if entry is None else dict(entry.settings)


def chosen(
    name: str, where: tuple[str, str], given: Mapping[str, Setting], shared: Mapping[str, Setting] | None = None
) -> Chosen:
    """An algorithm as it runs: its class's defaults, what it shares with another, the best known settings, what is given.

    Args:
        name: of the algorithm, on the command line.
        where: the task and the data set, by which best known settings are kept.
        given: the user's own settings.
        shared: settings that count where none are kept.

    Raises:
        InputError: there is no such algorithm, or the store holds a setting that it does not have.
    """
    kind, entry = algorithm_class(name), store.known(*where, name)
    base = dict(shared or {}) if entry is None else dict(entry.settings)
    fields = {field.name for field in dataclasses.fields(kind)}
    for setting in sorted(set(base) - fields):
        raise InputError(
            f"the store of step sizes has {setting}={base[setting]!r} for {name}, which has no such setting."
        )
    source = _untuned(kind) if entry is None else _SOURCES[entry.source]
    return Chosen(kind(**{**base, **given}), whence(kind, source, given))


def _untuned(kind: type[Algorithm]) -> str:
    """Where the steps come from that nobody has chosen."""
    found = any(field.default == "auto" for field in dataclasses.fields(kind) if field.name in STEPS)
    return UNTUNED if found else DEFAULTS


def whence(kind: type[Algorithm], source: str, given: Mapping[str, Setting]) -> str:
    """Where an algorithm's step sizes come from, in words."""
    has = [name for name in STEPS if name in {field.name for field in dataclasses.fields(kind)}]
    sorted_out: dict[str, list[str]] = {"given": [], UNTUNED: []}
    for name in has:
        if name in given:
            sorted_out[UNTUNED if isinstance(given[name], str) else "given"].append(name)
    for word, own in sorted_out.items():
        if own and own == has:
            return word
    parts = [f"{' and '.join(own)} {word}" for word, own in sorted_out.items() if own and word != source]
    return ", ".join([source, *parts])


def told_apart(steps: Mapping[str, str]) -> dict[str, str]:
    """What to call each algorithm: where some have chosen step sizes and others have not, these say so."""
    words = {
        name: next((word for word in (UNTUNED, DEFAULTS) if said.startswith(word)), "") for name, said in steps.items()
    }
    alike = len(set(words.values())) <= 1
    return {name: f"{name} ({word})" if word and not alike else name for name, word in words.items()}


def parse(words: list[str], kinds: Mapping[str, type[Algorithm]]) -> dict[str, dict[str, Setting]]:
    """`["inner_rounds=5", "fednest.hessian_lr=.01"]` -> settings per algorithm.

    A name without an algorithm goes to every algorithm that has the field; at least one must.

    Args:
        kinds: the algorithms of the run, by their names in it.

    Raises:
        InputError: a word that is not name=value, a name no algorithm has (with the nearest), a value of another type.
    """
    settings: dict[str, dict[str, Setting]] = {name: {} for name in kinds}
    known = {name: {f.name: f for f in dataclasses.fields(kind)} for name, kind in kinds.items()}
    for word in words:
        name, equals, text = word.partition("=")
        check(equals and name, f"--set takes name=value, as in inner_rounds=5; got {word!r}.")
        owner, dot, field = name.rpartition(".")
        if dot and owner not in kinds:
            raise unknown_name("algorithm in this run called", owner, kinds)
        takers = [owner] if dot else [a for a in kinds if field in known[a]]
        if not takers or field not in known[takers[0]]:
            raise unknown_name(f"setting of {owner or ', '.join(kinds)}", field, {f for a in kinds for f in known[a]})
        for taker in takers:
            settings[taker][field] = _value(known[taker][field], text)
    return settings


def _value(field: dataclasses.Field, text: str) -> Setting:
    role = field.metadata.get("role")
    try:
        if role == "rate":
            words = {str(word).lower(): word for word in field.metadata.get("words", ())}
            return words[text.lower()] if text.lower() in words else float(text)
        if role == "count":
            return None if text.lower() == "none" else int(text)
        if role == "option":
            return {"true": True, "false": False}[text.lower()]
        return int(text) if text.lstrip("-").isdigit() else text
    except (ValueError, KeyError):
        kind = {"rate": "a number", "count": "a whole number", "option": "true or false"}[str(role)]
        raise InputError(f"{field.name} takes {kind}; got {text!r}.") from None
