"""Ours: x by its hypergradient, in one run whose steps nobody searched for here.

This is the one place that says what "ours" is.
"""

from __future__ import annotations

import fedbilevel as fb
from fedbilevel.settings import best

from .purse import Point, Purse

EVERY = 5  # iterations between two looks at x


class Trail(fb.callbacks.Callback):
    """Keeps x, and what it took, at every row of the history."""

    def __init__(self) -> None:
        self.points: list[Point] = []

    def record(self, run: fb.callbacks.Running, rows: list) -> None:
        self.points.append(Point(run.rounds, run.bytes_down + run.bytes_up, run.x))


def ours(purse: Purse) -> None:
    """One run of Lockstep over the whole budget; what it returns is its last x."""
    task, ground, trail = purse.task, purse.ground, Trail()
    settings = best(task.name, task.dataset, "lockstep") or dict(ground.ours)
    algorithm = fb.Lockstep(**{**settings, "batch_size": ground.batch_size})
    fb.solve(
        task.problem, task.data, algorithm, task.x, task.y, rounds=purse.budget, key=purse.key,
        engine=ground.engine(), evaluate_every=EVERY, callbacks=[trail], check=False,
    )  # fmt: skip
    purse.trail[:] = trail.points
    purse.rounds, purse.bytes = trail.points[-1][:2]
