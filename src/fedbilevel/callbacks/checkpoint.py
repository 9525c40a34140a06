"""Checkpoints: the state, the clients' states, the iteration and the history, so that a run can go on."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

from .. import arrays
from ..best import Kept, Variables
from ..engines.base import Carry
from ..errors import InputError, check
from ..given import JSON
from ..identity import Identity
from ..processes import ALONE, CHECKPOINT, Processes, note
from ..result import EMPTY
from .base import Callback, Row, Running
from .earlier import TYPED, reordered

FILE = "checkpoint.eqx"
FORMAT = TYPED  # 1, which had no number: no more than the states' arrays; 2: with the number of each part's


class Checkpoint(Callback):
    """Saves a checkpoint now and then, and at the end, however the run ends.

    Resume with `solve(..., resume=folder)`: the numbers are those of the uninterrupted run.

    Args:
        folder: where `checkpoint.eqx` is kept; each checkpoint replaces the last one in a single step. Of several
            processes, 0 writes it, and all read it.
        every: seconds between checkpoints.
    """

    saves = True

    def __init__(self, folder: str | os.PathLike[str], every: float = 30.0):
        self.folder, self.every = Path(folder), every
        self._saved = time.monotonic()

    def start(self, run: Running) -> None:
        run.processes.said(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        self._saved = time.monotonic()

    def advance(self, run: Running) -> None:
        if run.processes.said(lambda: time.monotonic() - self._saved > self.every):
            self._save(run)

    def finish(self, run: Running, error: BaseException | None) -> None:
        self._save(run)

    def _save(self, run: Running) -> None:
        fingerprint = run.fingerprint()  # of several processes, of what all of them hold
        so_far = run.carry, run.totals(), list(run.history), fingerprint, run.snapshot, run.kept
        run.processes.said(lambda: save(self.folder / FILE, *so_far))
        note(CHECKPOINT, str((self.folder / FILE).absolute()))
        run.keep(run.carry)
        self._saved = time.monotonic()


def save(
    path: Path,
    carry: Carry,
    totals: dict[str, JSON],
    history: list[Row],
    fingerprint: dict[str, JSON],
    snapshot: Carry | None = None,
    kept: Kept | None = None,
) -> None:
    """Write a checkpoint, beside the old one and then in its place.

    With where the run may go back to, if it may, and the best x and y, if they are kept.
    """
    rows = [{name: None if value is EMPTY else value for name, value in row.items()} for row in history]
    head: dict[str, JSON] = {
        "iteration": carry.iteration,
        "totals": totals,
        "history": rows,
        "fingerprint": fingerprint,
    }
    parts = {"state": carry.state, "client_state": carry.client_state}
    if snapshot is not None:
        head["snapshot"] = snapshot.iteration
        parts |= {"snapshot": snapshot.state, "snapshot_client_state": snapshot.client_state}
    if kept is not None:
        head["kept"], best = kept.saved()
        parts |= best
    write(path, head, parts)


def write(path: Path, head: dict[str, JSON], parts: dict[str, PyTree]) -> None:
    """A line of JSON, `head` with the format's number and what follows, and the parts' arrays one after the other."""
    beside = path.with_suffix(".new")
    with beside.open("wb") as file:
        count = {name: arrays.count_of(part) for name, part in parts.items()}
        some = [name for name, part in parts.items() if isinstance(part, arrays.Elsewhere)]
        told = {"format": FORMAT, **head, "parts": count} | ({"touched": some} if some else {})
        file.write((json.dumps(told) + "\n").encode())
        for part in parts.values():
            arrays.write_leaves(file, part)
    os.replace(beside, path)


class Saved(NamedTuple):
    """What a file holds: its head, and each part's arrays. Parts that a reader does not know are no harm."""

    head: dict
    parts: dict[str, list[np.ndarray]]


def read(path: Path, like: dict[str, PyTree]) -> Saved:
    """A checkpoint of this or an earlier format.

    Args:
        like: by name, pytrees like the parts: a file of the first format does not say how long they are.

    Raises:
        InputError: it is of a later format.
    """
    with path.open("rb") as file:
        head = json.loads(file.readline())
        number = head.get("format", 1)
        check(
            number <= FORMAT,
            f"{path} is of format {number}, and this version of fedbilevel reads up to {FORMAT}: update it.",
        )
        count = head["parts"] if number > 1 else {name: len(arrays.leaves_of(part)) for name, part in like.items()}
        parts = {name: arrays.read_leaves(file, length) for name, length in count.items()}
        parts |= {name: arrays.Touched(parts[name]) for name in head.get("touched", ())}
        return Saved(head, parts | {name: reordered(tree, parts[name], number) for name, tree in like.items()})


def load(
    folder: str | os.PathLike[str], start: Carry, identity: Identity, processes: Processes = ALONE
) -> tuple[Carry, dict, list[Row]]:
    """(carry, totals, history) of the checkpoint in a folder, which all processes read.

    Raises:
        InputError: there is none, it cannot be read, or it is of another run (the message says what differs).
    """
    path = Path(folder) / FILE
    check(
        all(processes.together(path.is_file)),
        f"there is no checkpoint in {folder}: nothing to resume. Start without resuming.",
    )
    like = {"state": start.state, "client_state": start.client_state}
    try:
        head, parts = read(path, like)
        refuse = lambda other: check(
            not other,
            f"the checkpoint in {folder} is of another run: {other}. Use the same settings, or another folder.",
        )
        identity.follow(head["fingerprint"])
        refuse(identity.differences(head["fingerprint"]))
        state, client_state = (arrays.restore(tree, parts[name]) for name, tree in like.items())
        refuse(identity.other_oracles(head["fingerprint"], state))
        rows = [{name: EMPTY if value is None else value for name, value in row.items()} for row in head["history"]]
    except InputError:
        raise
    except Exception as error:  # truncated, or not a checkpoint at all
        raise InputError(
            f"{path} cannot be read as a checkpoint: start without resuming. ({type(error).__name__}: {error})"
        ) from error
    return Carry(state, client_state, int(head["iteration"])), head["totals"], rows


def load_kept(folder: str | os.PathLike[str], kept: Kept, like: Variables) -> None:
    """Have `kept` go on from the checkpoint in a folder, which `load` has read.

    Args:
        like: (x, y), structured like the best ones.

    Raises:
        InputError: it keeps no best, or by another metric.
    """
    head, parts = read(Path(folder) / FILE, {})
    kept.restore(head.get("kept"), parts, like, f"the checkpoint in {folder}")
