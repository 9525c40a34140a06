"""What ran, with which settings, and where each of them came from."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .. import store
from ..algorithms import ALGORITHMS
from ..errors import InputError
from ..settings import STEPS
from .found import Found
from .markup import number, table, text

_HOW = ("engine", "cohort", "iterations", "rounds", "evaluate_every", "precision", "compile", "keep")
_CLIENTS = "clients_an_exchange"
_MOST = 24  # algorithms side by side


def title(found: Found) -> str:
    """The page's title, not escaped."""
    names = [*found.algorithms]
    some = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"{found.what}: {some}" if some else found.what


def ran(found: Found) -> str:
    """What ran: the task or the application, clients, seeds, versions."""
    config, rows = found.config, []
    kind = "task" if "task" in config else "application" if "app" in config else ""
    if kind:
        rows.append((kind, found.what))
    options = config.get("options")
    rows += [(name, value) for name, value in options.items()] if isinstance(options, dict) else []
    told = [run.head["protocol"].get("clients") for run in found.runs if isinstance(run.head.get("protocol"), dict)]
    if told and isinstance(told[0], int) and not (isinstance(options, dict) and options.get("clients")):
        rows.append(("clients", told[0]))
    seeds = list(dict.fromkeys(run.seed for run in found.runs))
    rows.append(("seeds", ", ".join(map(str, seeds[:20])) + (f" and {len(seeds) - 20} more" * (len(seeds) > 20))))
    rows += [(name, config.get(name)) for name in (*_HOW, _CLIENTS)]
    raced = config.get("tune")
    rows += [(f"tune: {name}", value) for name, value in raced.items()] if isinstance(raced, dict) else []
    rows += [(name, ", ".join(versions)) for name, versions in _versions(found).items()]
    shown = [(name, value) for name, value in rows if value is not None and value != ""]
    return table([], [[text(name.replace("_", " ")), text(_plain(value))] for name, value in dict(shown).items()])


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(map(str, value))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _versions(found: Found) -> dict[str, list[str]]:
    """Versions of what computed it, by name; several where runs differ."""
    versions: dict[str, dict[str, None]] = {}
    for run in found.runs:
        told = run.head.get("config")
        for name in ("fedbilevel", "jax"):
            if isinstance(told, dict) and name in told:
                versions.setdefault(name, {})[str(told[name])] = None
    return {name: [*several] for name, several in versions.items()}


def settings(found: Found) -> str:
    """Each algorithm's settings, and where each came from."""
    told = found.config.get("algorithms")
    fields = {name: own for name, own in told.items() if isinstance(own, dict)} if isinstance(told, dict) else {}
    chosen = next((run.outcome["chosen"] for run in found.runs if isinstance(run.outcome.get("chosen"), dict)), None)
    parts = []
    if fields:
        names = [*fields][:_MOST]
        words = list(dict.fromkeys(word for name in names for word in fields[name]))
        words.sort(key=lambda word: word not in STEPS)  # stable
        rows = [[text(word), *(_cell(found, name, word, fields[name]) for name in names)] for word in words]
        parts.append(table(["", *map(text, names)], rows))
    if chosen is not None and isinstance(chosen.get("settings"), dict):
        rows = [[text(word), text(_short(value))] for word, value in chosen["settings"].items()]
        parts.append(table(["chosen", text(chosen.get("algorithm", ""))], rows))
    return "".join(parts) or '<p class="dim">not told.</p>'


def _cell(found: Found, name: str, word: str, fields: Mapping[str, object]) -> str:
    """A value, and where it came from; nothing where the algorithm has no such setting."""
    if word not in fields:
        return ""
    value, whence = fields[word], source(found, name, word, fields[word])
    if value == "auto":
        lately = [run.last(word) for run in found.algorithms.get(name, [])]
        lately = [each for each in lately if math.isfinite(each) and each > 0]
        whence = f"lately {number(sorted(lately)[len(lately) // 2])}" if lately else ""
    return text(_short(value)) + (f' <span class="dim">{text(whence)}</span>' if whence else "")


def _short(value: object) -> str:
    return number(value) if isinstance(value, float) else str(value)


def source(found: Found, name: str, word: str, value: object) -> str:
    """Where a setting came from, in a word: a step size as config.json says, another as defaults and the store have it."""
    base, *others = found.steps.get(name, "").split(", ")
    if word in STEPS:
        said = [other.split() for other in others]  # as in "inner_lr and outer_lr given"
        return next((words[-1] for words in said if word in words[:-1]), base)
    kind = ALGORITHMS.get(name)
    if kind is None or base == "the app's own":
        return base
    default = getattr(kind, "__dataclass_fields__", {}).get(word)
    if default is not None and default.default == value:
        return "default"
    return "stored" if base.startswith("stored") and _stored(found, name).get(word, ...) == value else ""


def _stored(found: Found, name: str) -> Mapping[str, object]:
    options = found.config.get("options")
    dataset = options.get("dataset") if isinstance(options, dict) else None
    try:
        entry = store.known(found.what, str(dataset), name)
    except InputError:
        return {}
    return {} if entry is None else dict(entry.settings)
