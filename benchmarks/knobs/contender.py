"""A run in which no step is given, and where its x was at every look."""

from __future__ import annotations

import dataclasses
import warnings

import jax
import numpy as np

import fedbilevel as fb
from knobs.grids import Curve
from knobs.problems import Case, Contestant
from knobs.quality import quality


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
        curve: Phi at looks; infinite from where it blew up.
        end: Phi at the returned x.
        bytes: payload of a round, relative to a run with numbers.
        words: why it ended early, if it did.
    """

    curve: Curve
    end: float
    bytes: float
    words: str = ""


class Recorder(fb.callbacks.Callback):
    """x at every row of the history, and the rounds up to it."""

    def __init__(self):
        self.rows: list[tuple[int, int, object]] = []

    def record(self, run, rows):
        self.rows += [(int(row["iteration"]), int(row["rounds"]), run.x) for row in rows]

    def went_back(self, run):
        self.rows = [row for row in self.rows if row[0] <= run.iteration]


def contend(case: Case, contestant: Contestant, seed: int) -> Outcome:
    """Run it: `contestant(batch)`, as a user would who knows no step."""
    task, seen, words = case.task(seed), Recorder(), ""
    algorithm = contestant(case.batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fb.errors.FedbilevelWarning)  # that x swings: the curve shows it
        try:
            run = fb.solve(
                task.problem, task.data, algorithm, task.x, task.y, rounds=contestant.budget, key=task.key,
                engine=case.engine, callbacks=[seen], evaluate_every=contestant.every, check=False,
            )  # fmt: skip
        except fb.RunError as error:
            run, words = error.result, str(error)
    judge = quality(task)
    xs = jax.tree.map(lambda *leaves: np.stack(leaves), *(x for _, _, x in seen.rows))
    curve = Curve(np.array([rounds for _, rounds, _ in seen.rows]), judge(xs))
    end = np.inf if words else float(judge(jax.tree.map(lambda leaf: np.asarray(leaf)[None], run.x))[0])
    last = run.history[-1]
    spent = (last["bytes_down"] + last["bytes_up"]) / max(last["rounds"], 1)
    return Outcome(curve, end, float(spent) / _bytes(case, contestant, task), words)


def _bytes(case: Case, contestant: Contestant, task: fb.tasks.Task) -> float:
    """Bytes of a round of a run with numbers."""
    given = contestant(case.batch, inner_lr=0.01, hessian_lr=0.01, outer_lr=0.01)
    told = fb.protocol(given, task.problem, task.data, task.x, task.y, engine=case.engine)
    return (told.bytes_down + told.bytes_up) / told.rounds
