"""What each client holds, from the task made again by config.json: a folder keeps no rows."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from ..errors import InputError
from ..tasks import TASKS, Options
from .clients import Held
from .found import Found

_LABEL, _MOST = "label", 20  # what rows call their label, and how many there may be
NETWORK = "rows never leave the sites"


def held(found: Found) -> Held | str:
    """What clients hold; or, in words, why that is not told."""
    name, told = found.config.get("task"), found.config.get("options")
    if found.config.get("engine") == "nvflare":
        return NETWORK
    if not isinstance(name, str) or name not in TASKS or not isinstance(told, dict):
        return "an application's rows are known to its file alone" if "app" in found.config else "no task is known"
    known = {field.name for field in dataclasses.fields(Options)}
    options = {word: value for word, value in told.items() if word in known}
    seeds = found.config.get("seeds")
    seed = next((each for each in seeds if isinstance(each, int)), 0) if isinstance(seeds, list) else 0
    if any(not (value is None or isinstance(value, str | int | float)) for value in options.values()):
        return "config.json has options that are none"
    try:
        with jax.enable_x64(found.config.get("precision") == 64):
            data = TASKS[name](Options(**{**options, "seed": seed})).data
    except (InputError, OSError, TypeError, ValueError) as error:
        return str(error).rstrip(".")
    levels = {"inner": data.inner, "outer": data.outer}
    rows = {title: np.asarray(level.counts) for title, level in levels.items()}
    names = list(data.names) or [f"client {k}" for k in range(data.clients)]
    return Held(names, rows, _labels([(level.rows, rows[title]) for title, level in levels.items()]))


def _labels(levels: list[tuple[object, np.ndarray]]) -> np.ndarray | None:
    """How many rows of each label a client has; None where rows have no label, or too many."""
    found = []
    for rows, counts in levels:
        own = rows.get(_LABEL) if isinstance(rows, dict) else None
        if own is None:
            return None
        own = np.asarray(own)
        if own.ndim != 1 or not np.issubdtype(own.dtype, np.integer) or own.min() < 0 or own.max() >= _MOST:
            return None
        found.append((np.repeat(np.arange(len(counts)), counts), own[: counts.sum()]))
    labels = 1 + max(int(own.max()) for _, own in found)
    table = np.zeros((len(levels[0][1]), labels), int)
    for clients, own in found:
        np.add.at(table, (clients, own), 1)
    return table
