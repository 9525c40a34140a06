"""A run kept in a folder of its own: its rows, its checkpoint, its variables, and what became of it."""

from __future__ import annotations

import json
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..best import Best
from ..callbacks import CSV, Callback, Checkpoint, Progress
from ..callbacks.base import Running
from ..engines.base import Engine
from ..errors import RunError, check, with_notes
from ..given import JSON
from ..metrics import STOPPED
from ..processes import of as over
from ..result import Result, leave
from ..tables.prepared import PREPARED, Prepared, load_prepared
from .folder import CHECKPOINT, CLIENTS, HISTORY, OUTCOME

RESUMED = "resumed_at"  # in outcome.json, the iteration from which a run last went on


@typing.runtime_checkable
class Described(typing.Protocol):
    """What can be kept: a `Description`, or what else is run like one."""

    @property
    def name(self) -> str: ...

    @property
    def engine(self) -> Engine | None: ...

    @property
    def prepared(self) -> Prepared | None: ...  # how tables became its rows, if they did

    def run(self, *, callbacks: Sequence[Callback] = (), resume: str | os.PathLike[str] | None = None) -> Result: ...


def keep(
    description: Described, place: Path, *, resume: bool = False, columns: Mapping[str, str | int] | None = None,
    quiet: bool = False, every: float = 30.0, callbacks: Sequence[Callback] = (),
) -> Result:  # fmt: skip
    """Run it, and leave history.csv, checkpoint.eqx, what `load_result` reads and outcome.json in the folder.

    So it does however the run ends.

    Where it keeps the best x and y, they are in best.npz, with iteration, rounds and value. Where its rows were tables,
    prepared.json says how they became rows. How each client fares, where that is asked and known, is in clients.csv.

    Args:
        place: the folder; what is there is gone on with or replaced.
        resume: go on from the checkpoint in it, if there is one.
        columns: constant columns of history.csv, put first.
        quiet: whether no progress is shown.
        every: seconds between checkpoints.
        callbacks: more of them, heard before the description's own.

    Raises:
        InputError, Diverged, RunError: as `solve`.
    """
    begun = _Begun()
    ours: list[Callback] = [begun, CSV(place / HISTORY, columns), Checkpoint(place, every)]
    ours += [] if quiet else [Progress(description.name)]
    if description.prepared is not None:
        _keep_prepared(description.prepared, place, resume)
    going_on = place if resume and (place / CHECKPOINT).is_file() else None
    leads = over(getattr(description.engine, "mesh", None)).leads  # of several processes one writes
    try:
        result = description.run(callbacks=[*ours, *callbacks], resume=going_on)
    except RunError as failure:
        if leads:
            told: dict[str, JSON] = {"status": "failed", "sentence": with_notes(failure)}
            _leave(place, failure.result, columns or {}, told | begun.told(failure.result))
        raise
    if leads:
        _leave(place, result, columns or {}, ended(result) | begun.told(result))
    return result


class _Begun(Callback):
    """Where a run went on, if it did."""

    in_bulk = True
    iteration = 0

    def start(self, run: Running) -> None:
        self.iteration = run.iteration

    def told(self, result: Result | None) -> dict[str, JSON]:
        """For outcome.json; nothing of a run that began at its start, or had ended already."""
        further = self.iteration and (result is None or result.iteration > self.iteration)
        return {RESUMED: self.iteration} if further else {}


def _keep_prepared(prepared: Prepared, place: Path, resume: bool) -> None:
    """Leave beside a run how tables became its rows; a run that goes on has to have the same."""
    file = place / PREPARED
    if resume and file.is_file():
        same = load_prepared(file) == prepared
        check(same, f"the tables have changed since the run in {place} began: start it anew, without --resume.")
    place.mkdir(parents=True, exist_ok=True)
    prepared.save(file)


def _leave(place: Path, result: Result | None, columns: Mapping[str, str | int], outcome: Mapping[str, JSON]) -> None:
    if result is not None:
        leave(result, place, columns)
        if result.clients is None:
            (place / CLIENTS).unlink(missing_ok=True)
        else:
            result.clients.write(place / CLIENTS)
    tell(place, outcome)


def ended(result: Result) -> dict[str, JSON]:
    """How a run that ended well did, for outcome.json."""
    reason: dict[str, JSON] = {} if result.stopped is None else {STOPPED: result.stopped}
    figures: dict[str, JSON] = {} if result.kept is None else {"best": figures_of(result.kept)}
    return {"status": "done", "iterations": result.iteration, "compiled": result.compiled, **reason, **figures}


def went_on(place: Path) -> dict[str, JSON]:
    """What the outcome.json that `keep` has written says of where the run went on; {} where it did not."""
    file = place / OUTCOME
    told = json.loads(file.read_text()) if file.is_file() else {}
    return {RESUMED: told[RESUMED]} if RESUMED in told else {}


def figures_of(best: Best) -> dict[str, JSON]:
    """Where a run was the best, and how good."""
    return {"iteration": best.iteration, "rounds": best.rounds, "value": best.value}


def tell(folder: Path, outcome: Mapping[str, JSON]) -> None:
    """Write what became of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OUTCOME).write_text(json.dumps(outcome, indent=2) + "\n")
