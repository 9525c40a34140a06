"""What to look at twice: an x that swings, a v that lags, values that are not finite; as the folder tells it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..diagnosis.swing import Swing, Trail
from .found import Found, Run
from .markup import listed

_LEAST = 12  # rows from which on a column is judged, by its last third
_STAYS = 0.8  # a residual of v that stays above has not come down
_GROWS = 1.0
_TURNS = 0.6  # minibatches alone make x turn back by a half


def warned(found: Found) -> str:
    """The part of the page; empty where there is nothing to warn of."""
    told: dict[str, list[Run]] = {}
    for run in found.runs:
        for sentence in sentences(run):
            told.setdefault(sentence, []).append(run)
    return listed([f"{_of(runs, found)}{sentence}" for sentence, runs in told.items()], "warn")


def _of(runs: list[Run], found: Found) -> str:
    """Whose it is, where there are several runs."""
    if len(found.runs) == 1:
        return ""
    names = [f"{run.algorithm}, seed {run.seed}" for run in runs]
    return "; ".join(names[:4]) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "") + ": "


def sentences(run: Run) -> Iterator[str]:
    """Of one run."""
    kept = run.outcome.get("warnings")
    if isinstance(kept, list):
        yield from map(str, kept)
    swing = _swing(run)
    late = {name: _late(run, name) for name in ("turn", "vector_residual", "vector_growth")}
    if swing is not None:
        period = f"a period of about {2 * swing.half} iterations"
        yield f"x swings at the end, with {period}: lower outer_lr, or let v and y catch up."
    elif late["turn"].size and np.mean(late["turn"]) < -_TURNS:
        yield "x turns back from one iteration to the next: lower outer_lr."
    if late["vector_residual"].size and np.median(late["vector_residual"]) > _STAYS:
        yield "v lags: its residual stays near 1. Raise hessian_lr."
    if late["vector_growth"].size and np.median(late["vector_growth"]) > _GROWS:
        yield "v grows with every Hessian factor: lower hessian_lr."
    broken = [name for name in run.rows.columns if name not in ("algorithm", "stopped") and _infinite(run, name)]
    if broken:
        yield f"values that are not finite: {', '.join(broken[:6])}."
    back = run.last("halvings")
    if back > 0:
        yield f"it blew up and went back {int(back)} time{'s' * (back > 1)}, with half the steps since."


def _late(run: Run, column: str) -> np.ndarray:
    """The last third of a column that is long enough to be judged."""
    if column not in run.rows:
        return np.zeros(0)
    values = run.rows[column].dropna().to_numpy(float)
    return values[-(len(values) // 3) :] if len(values) >= _LEAST else np.zeros(0)


def _infinite(run: Run, column: str) -> bool:
    values = run.rows[column].to_numpy(float)
    return bool(np.isinf(values).any())


def _swing(run: Run) -> Swing | None:
    """How x swings, by the moves that the checkpoint keeps: what the run itself would say."""
    try:
        trail = Trail()
        trail.restore(run.totals["trail"])
        return trail.swing()
    except (KeyError, TypeError, ValueError, IndexError):  # none, or of an earlier version
        return None
