"""A folder of results: whether it is ours, whether it holds the same run, and whether the run goes on in it.

    config.json                   what ran: every setting that decides the numbers
    history.csv                   a row per evaluation
    summary.csv, summary.md       a row per algorithm; beside them a figure per metric
    cost.csv, cost.md, cost.png   what `fedbilevel cost` predicts
    report.html                   what `fedbilevel report` writes
    runs/NAME-SEED/               one run each: history.csv, checkpoint.eqx, variables.npz, result.json, outcome.json;
                                  best.npz if kept, prepared.json if its rows were tables

The one run of an application lies in the folder itself, with rounds.csv and the files of the network if it was run over one;
so does what `tune` leaves, with candidates.csv: who raced, and who was dropped when.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ..errors import InputError, check
from ..given import JSON
from ..identity import differences
from ..saved import BEST as BEST
from ..saved import HEAD as RESULT
from ..saved import HISTORY as HISTORY
from ..saved import VARIABLES as VARIABLES
from ..tables.prepared import PREPARED

CONFIG, CHECKPOINT, OUTCOME, ROUNDS, RUNS = "config.json", "checkpoint.eqx", "outcome.json", "rounds.csv", "runs"
CANDIDATES, CLIENTS, PAGE = "candidates.csv", "clients.csv", "report.html"
TABLES = "tables"  # in outcome.json, what agreeing on them took

_OF_A_RUN = (
    HISTORY, CHECKPOINT, VARIABLES, BEST, RESULT, CLIENTS, OUTCOME, ROUNDS, CANDIDATES, PREPARED, "nvflare.log",
)  # fmt: skip
_TABLES = ("summary.csv", "summary.md", "cost.csv", "cost.md", "cost.png", PAGE)
_NETWORK = ("nvflare", "poc", "job", "sites")  # folders of a run over a network on this machine
_SIGNS = (CONFIG, HISTORY, OUTCOME)  # any of them makes a folder ours; the first is younger than the others
# What may be another when a run goes on: how long it is, what follows from that, and what is only told.
_FREE = ("iterations", "rounds", "seeds", "clients_an_exchange", "steps")


def opened(
    out: str | os.PathLike[str], config: Mapping[str, JSON], *, resume: bool = False, overwrite: bool = False,
    alone: bool = False,
) -> Path:  # fmt: skip
    """The folder, made for a run of this configuration or found fit to go on in, with its config.json.

    Args:
        config: what runs.
        resume: go on with the run that is there.
        overwrite: take away the results that are there.
        alone: whether the run lies in the folder itself.

    Raises:
        InputError: the folder is in use and neither `resume` nor `overwrite` is set, it holds nothing of ours, or
            `resume` finds nothing or another run.
    """
    folder, plain = Path(out), json.loads(json.dumps(config))
    check(not folder.exists() or folder.is_dir(), f"{folder} is a file: name a folder for the results.")
    if resume:
        _same(folder, plain, alone)
    elif folder.exists() and any(folder.iterdir()):
        check(overwrite, f"{folder} is not empty: name another folder, or add --resume to go on, or --overwrite.")
        check(
            any((folder / name).is_file() for name in _SIGNS),
            f"{folder} is not empty and holds no results of ours: name another folder.",
        )
        clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(plain, indent=2) + "\n")
    return folder


def configuration(folder: str | os.PathLike[str]) -> dict[str, JSON]:
    """What config.json says; {} where there is none (an earlier version left none for an application).

    Raises:
        InputError: it cannot be read.
    """
    file = Path(folder) / CONFIG
    if not file.is_file():
        return {}
    try:
        plain = json.loads(file.read_text())
    except ValueError:
        plain = None
    if not isinstance(plain, dict):
        raise InputError(f"{file} cannot be read: start again without --resume, with --overwrite.")
    return plain


def clear(folder: Path) -> None:
    """Remove what an earlier run left, and nothing else."""
    figures = [f"{name}.png" for name in _columns(folder / HISTORY) if Path(name).name == name]
    for name in (CONFIG, *_OF_A_RUN, *_TABLES, *figures):
        (folder / name).unlink(missing_ok=True)
    for place in (folder / RUNS).glob("*"):
        _empty(place)
    _empty(folder / RUNS)
    for name in _NETWORK:
        shutil.rmtree(folder / name, ignore_errors=True)


def _empty(place: Path) -> None:
    """Remove a folder of a run, but for files of somebody else's."""
    if not place.is_dir():
        return
    for name in (CONFIG, *_OF_A_RUN, "history.csv.new", "checkpoint.new"):
        (place / name).unlink(missing_ok=True)
    if not any(place.iterdir()):
        place.rmdir()


def _same(folder: Path, config: dict[str, JSON], alone: bool) -> None:
    """Refuse to go on where there is nothing, or another run."""
    there = configuration(folder)
    if alone:
        check((folder / CHECKPOINT).is_file(), f"there is no checkpoint in {folder}: nothing to resume.")
    else:
        check(there, f"{folder} holds no run to resume: leave --resume out, or name the run's folder.")
    if there:
        on = lambda plain: f"an application, {plain['app']}" if "app" in plain else f"a task, {plain.get('task')}"
        of = lambda plain: f"{on(plain)}, tuned" if "tune" in plain else on(plain)
        same = of(there) == of(config)
        check(
            same, f"{folder} holds another run: that is of {of(there)}, and this of {of(config)}. Use another folder."
        )
        kept = lambda plain: {k: v for k, v in _flat(plain).items() if k.partition(".")[0] not in _FREE}
        other = differences(kept(there), kept(config))
        check(not other, f"{folder} holds another run: {other}. Use the same settings, or another folder.")


def _flat(tree: Mapping[str, JSON], prefix: str = "") -> dict[str, JSON]:
    """Nested settings under dotted names."""
    flat: dict[str, JSON] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _columns(file: Path) -> list[str]:
    """The columns of a history."""
    if not file.is_file():
        return []
    with file.open(newline="", errors="replace") as text:
        return next(csv.reader(text), [])
