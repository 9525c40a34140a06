"""Runs the plan: a file for each finished run, so that an interrupted study goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pandas

from fedbilevel.memory import release

from ..kinds import DataDir
from ..stages import open_folder
from . import search
from .contenders import Contender
from .grounds import Ground
from .judge import Judge, judge
from .plan import Plan
from .purse import Point, Purse

Telling = Callable[[str], None]
KEYS = ["task", "contender", "length", "seed"]


def run(plan: Plan, folder: Path, data_dir: DataDir, say: Telling) -> pandas.DataFrame:
    """Every run of the plan, judged: a row for each x that a contender would have returned.

    Columns: task, contender, length, seed; rounds and bytes spent when x was there, phi and test.
    The last row of a run is what it returns, with all that it spent.

    Raises:
        InputError: the folder holds another study, or data are missing.
    """
    for ground in plan.grounds:  # what can be refused is refused now
        ground.build(plan.seeds[0], data_dir)
    open_folder(folder, json.loads(json.dumps(plan.to_dict())))
    if any(c.optuna for c in plan.contenders) and not search.has_optuna():
        say(search.INSTALL)
    frames, judged = [], _Judges(data_dir)
    for ground, seed, contender, length in plan.runs():
        if contender.optuna and not search.has_optuna():
            continue
        name = f"{contender.label}{f'-{length}' if length else ''}-{seed}.csv"
        file = folder / "runs" / ground.name / name
        if not file.is_file():
            purse = spend(ground, contender, length, seed, plan.budget, data_dir)
            _keep(file, verdicts(purse, judged(ground, seed)))
            say(f"{ground.name}, seed {seed}: {contender.label} {length or ''}".rstrip())
        keys = dict(zip(KEYS, (ground.name, contender.label, length, seed), strict=True))
        frames.append(pandas.read_csv(file).assign(**keys))
    return pandas.concat(frames, ignore_index=True)


def spend(ground: Ground, contender: Contender, length: int, seed: int, budget: int, data_dir: DataDir) -> Purse:
    """The purse after one contender's run."""
    task = ground.build(seed, data_dir)
    purse = Purse(ground, task, budget, jax.random.fold_in(task.key, 1))
    contender.run(purse, length, seed)
    return purse


def verdicts(purse: Purse, judge: Judge) -> pandas.DataFrame:
    """The trail judged: rounds, bytes, phi, test; the last row has all that was spent."""
    known: dict[bytes, tuple[float, float]] = {}
    rows = []
    for point in [*purse.trail, Point(purse.rounds, purse.bytes, purse.trail[-1].x)]:
        same = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(point.x))
        known[same] = known.get(same) or judge(point.x)
        rows.append((point.rounds, point.bytes, *known[same]))
    return pandas.DataFrame(rows, columns=["rounds", "bytes", "phi", "test"])


def _keep(file: Path, frame: pandas.DataFrame) -> None:
    """Written whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_suffix(".part")
    frame.to_csv(half, index=False)
    half.replace(file)


class _Judges:
    """The judge of the ground and seed at hand: made when it is needed, and then let go."""

    def __init__(self, data_dir: DataDir) -> None:
        self.data_dir = data_dir
        self.whose: tuple[str, int] | None = None

    def __call__(self, ground: Ground, seed: int) -> Judge:
        if self.whose != (ground.name, seed):
            release()
            self.whose, self.judge = (ground.name, seed), judge(ground, seed, self.data_dir)
        return self.judge
