"""The store of best known settings: which step sizes, and what goes with them, an algorithm takes on a task.

Two files in TOML, sections [TASK.DATASET.ALGORITHM]: `settings.toml` beside this module ships with the library, and the
user's own holds what `fedbilevel search` found on this machine. The user's counts where both have an entry.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from .algorithm import Setting
from .errors import InputError
from .given import JSON

PLACE = "FEDBILEVEL_STORE"  # environment variable that names the user's file
_FOUND = "found"  # of an entry: how it was found, no setting


@dataclasses.dataclass(frozen=True)
class Entry:
    """The best known settings of one (task, data set, algorithm).

    Attributes:
        settings: step sizes, and the counts and options that they were found with.
        source: where it stands: "library" or "search".
    """

    settings: Mapping[str, Setting]
    source: str


def users_file() -> Path:
    """The user's own file: $FEDBILEVEL_STORE, or steps.toml in the user's data folder."""
    if named := os.environ.get(PLACE):
        return Path(named)
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "fedbilevel" / "steps.toml"


def known(task: str, dataset: str, algorithm: str) -> Entry | None:
    """The best known settings; None where there are none.

    Raises:
        InputError: the user's file cannot be read.
    """
    for source, sections in (("search", _users()), ("library", _shipped())):
        entry: JSON = sections
        for name in (task, dataset, algorithm):
            entry = entry.get(name, {})
            if not isinstance(entry, dict):
                where = f"{users_file()} has no sections [TASK.DATASET.ALGORITHM] under {name}"
                raise InputError(f"the store of step sizes {where}: mend it.")
        if entry:
            return Entry({name: value for name, value in entry.items() if name != _FOUND}, source)
    return None


def put(
    task: str, dataset: str, algorithm: str, settings: Mapping[str, Setting], found: Mapping[str, str | float | int]
) -> Path:
    """Write an entry into the user's file, in the place of an earlier one; returns the file.

    Args:
        found: how: rounds, score, seeds and the like, for whoever reads the file.

    Raises:
        InputError: the file cannot be read.
    """
    import tomlkit

    file, table = users_file(), _users()
    whole = tomlkit.parse(file.read_text()) if table else tomlkit.document()
    part = whole
    for name in (task, dataset):
        part = part.setdefault(name, tomlkit.table(is_super_table=True))
    entry = tomlkit.table()
    entry.update({name: value for name, value in settings.items() if value is not None})
    entry[_FOUND] = tomlkit.inline_table()
    entry[_FOUND].update(found)
    part[algorithm] = entry
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(file.name + ".new")
    beside.write_text(tomlkit.dumps(whole))
    os.replace(beside, file)
    return file


def _shipped() -> dict[str, JSON]:
    return tomllib.loads(resources.files("fedbilevel").joinpath("settings.toml").read_text())


def _users() -> dict[str, JSON]:
    file = users_file()
    if not file.is_file():
        return {}
    try:
        return tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"the store of step sizes {file} cannot be read ({error}): mend it, or remove it.") from None
