"""Checkpoints: the state, the clients' states, the iteration and the history, so that a run can go on."""

from __future__ import annotations

import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from ..engines.base import Carry
from ..errors import InputError, check
from .base import Callback

FILE = "checkpoint.eqx"


class Checkpoint(Callback):
    """Saves a checkpoint now and then, and at the end, however the run ends.

    Resume with `solve(..., resume=folder)`: the numbers are those of the uninterrupted run.

    Args:
        folder: where `checkpoint.eqx` is kept; each checkpoint replaces the last one in a single step.
        every: seconds between checkpoints.
    """

    saves = True

    def __init__(self, folder: str | os.PathLike[str], every: float = 30.0):
        self.folder, self.every = Path(folder), every
        self._saved = time.monotonic()

    def start(self, run) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._saved = time.monotonic()

    def advance(self, run) -> None:
        if time.monotonic() - self._saved > self.every:
            self._save(run)

    def finish(self, run, error) -> None:
        self._save(run)

    def _save(self, run) -> None:
        save(self.folder / FILE, run.carry, run.totals(), list(run.history), run.fingerprint())
        run.keep(run.carry)
        self._saved = time.monotonic()


def save(
    path: Path, carry: Carry, totals: dict[str, Any], history: list[dict[str, Any]], fingerprint: dict[str, Any]
) -> None:
    """Write a checkpoint, beside the old one and then in its place."""
    head = {"iteration": carry.iteration, "totals": totals, "history": history, "fingerprint": fingerprint}
    beside = path.with_suffix(".new")
    with beside.open("wb") as file:
        file.write((json.dumps(head) + "\n").encode())
        eqx.tree_serialise_leaves(file, (carry.state, carry.client_state))
    os.replace(beside, path)


def load(folder: str | os.PathLike[str], start: Carry, fingerprint: dict[str, Any]) -> tuple[Carry, dict, list]:
    """(carry, totals, history) of the checkpoint in a folder.

    Raises:
        InputError: there is none, it cannot be read, or it is of another run (the message says what differs).
    """
    path = Path(folder) / FILE
    check(path.is_file(), f"there is no checkpoint in {folder}: nothing to resume. Start without resuming.")
    try:
        with path.open("rb") as file:
            head = json.loads(file.readline())
            other = differences(head["fingerprint"], fingerprint)
            check(
                not other,
                f"the checkpoint in {folder} is of another run: {other}. Use the same settings, or another folder.",
            )
            like = jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype) if eqx.is_array(a) else a,
                (start.state, start.client_state),
            )
            state, client_state = eqx.tree_deserialise_leaves(file, like)
    except InputError:
        raise
    except Exception as error:  # truncated, or not a checkpoint at all
        raise InputError(
            f"{path} cannot be read as a checkpoint: start without resuming. ({type(error).__name__}: {error})"
        ) from error
    return Carry(state, client_state, int(head["iteration"])), head["totals"], head["history"]


def differences(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two fingerprints, in words; empty if nothing does."""
    names = sorted(set(saved) | set(now))
    other = [f"{n} was {saved.get(n)!r} and is {now.get(n)!r}" for n in names if saved.get(n) != now.get(n)]
    return "; ".join(other[:3]) + (f"; and {len(other) - 3} more" if len(other) > 3 else "")


def checksum(tree: Any) -> str:
    """A short digest of a pytree's numbers."""
    value = 0
    for leaf in jax.tree.leaves(tree):
        value = zlib.crc32(np.asarray(leaf).tobytes(), value)
    return f"{value:08x}"
