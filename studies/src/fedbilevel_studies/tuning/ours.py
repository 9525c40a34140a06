"""Ours: x by its hypergradient, in one run.

This is the one place that says what "ours" is: `ours`, Lockstep whose steps are the best known of the task (the store, or
the ground's own), which searches found that no budget here pays for; and `tuned`, `fb.tune`, which is told nothing.
"""

from __future__ import annotations

import fedbilevel as fb
from fedbilevel.settings import best

from .purse import Purse


def ours(purse: Purse) -> None:
    """One run of Lockstep over the whole budget; what it returns is its last x."""
    task, ground = purse.task, purse.ground
    settings = best(task.name, task.dataset, "lockstep") or dict(ground.ours)
    algorithm = fb.Lockstep(**{**settings, "batch_size": ground.batch_size})
    points, _ = purse.solve(algorithm, purse.budget)
    purse.trail[:] = points


def tuned(purse: Purse) -> None:
    """One run of `fb.tune` over the whole budget, racing and judging included; what it returns is its last x."""
    purse.trail[:] = purse.tune(purse.budget)
