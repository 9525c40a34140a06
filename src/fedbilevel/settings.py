"""Step sizes and other settings of algorithms: checked-in best ones, and `name=value` words parsed by a field's type."""

from __future__ import annotations

import dataclasses
import tomllib
from importlib import resources

from .algorithm import Algorithm
from .algorithms import ALGORITHMS
from .errors import InputError, check, unknown_name

Setting = bool | int | float | str | None  # as files and the command line write one


def algorithm_class(name: str) -> type[Algorithm]:
    """The algorithm of that command-line name."""
    if name not in ALGORITHMS:
        raise unknown_name("algorithm", name, ALGORITHMS)
    return ALGORITHMS[name]


def best(task: str, dataset: str, algorithm: str) -> dict[str, Setting]:
    """The checked-in best settings of (task, data set, algorithm); {} where none are checked in."""
    text = resources.files("fedbilevel").joinpath("settings.toml").read_text()
    return dict(tomllib.loads(text).get(task, {}).get(dataset, {}).get(algorithm, {}))


def parse(words: list[str], algorithms: list[str]) -> dict[str, dict[str, Setting]]:
    """`["inner_rounds=5", "fednest.hessian_lr=.01"]` -> settings per algorithm.

    A name without an algorithm goes to every algorithm that has the field; at least one must.

    Raises:
        InputError: a word that is not name=value, a name no algorithm has (with the nearest), a value of another type.
    """
    settings: dict[str, dict[str, Setting]] = {name: {} for name in algorithms}
    known = {name: {f.name: f for f in dataclasses.fields(algorithm_class(name))} for name in algorithms}
    for word in words:
        name, equals, text = word.partition("=")
        check(equals and name, f"--set takes name=value, as in inner_rounds=5; got {word!r}.")
        owner, dot, field = name.rpartition(".")
        if dot and owner not in algorithms:
            raise unknown_name("algorithm in this run called", owner, algorithms)
        takers = [owner] if dot else [a for a in algorithms if field in known[a]]
        if not takers or field not in known[takers[0]]:
            raise unknown_name(
                f"setting of {owner or ', '.join(algorithms)}", field, {f for a in algorithms for f in known[a]}
            )
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
