"""What the runs would cost on typical networks: times as `fedbilevel cost --network all` predicts them."""

from __future__ import annotations

import math

import numpy as np
import pandas

from ..cost.model import PARTS, Prediction, clients_an_exchange, predict
from ..cost.network import NETWORKS, duration
from ..errors import InputError
from .found import Found
from .markup import dim, listed, table, text

_BAR = 120  # pixels of the longest one


def networks(found: Found) -> str:
    """The part of the page: a row per algorithm, a column per network."""
    try:
        told = _predicted(found.frame, clients_an_exchange(found.folder))
    except InputError as error:
        return dim(f"not told: {error}")
    except (ValueError, ArithmeticError, LookupError):  # numbers that are none
        return dim("not told: the history has numbers that no time can be made of.")
    goal = told.goal
    aim = f"Predicted time to {goal.name(goal.level)}" + (" test accuracy" if goal.metric == "test_accuracy" else "")
    share = f"computation: 1/{told.clients} of the recorded seconds"
    rows = [[text(name), *(_cell(told, network, name) for network in NETWORKS)] for name in found.algorithms]
    several = len(found.algorithms) > 1
    head = ["", *map(text, NETWORKS)]
    key = " ".join(
        f'<svg class="small" width="12" height="10" aria-hidden="true"><rect class="f{k}" width="12" height="10"/></svg> '
        f"{part}"
        for k, part in enumerate(PARTS)
    )
    return "".join(
        [
            f"<p>{text(aim)}{'; the fastest in bold' if several else ''}. {key}</p>",
            table(head, rows),
            listed([f"{name}: {network}" for name, network in NETWORKS.items()], "dim"),
            dim(f"Assumptions; {share}. Measured numbers: fedbilevel cost --latency --up --down."),
        ]
    )


def _predicted(frame: pandas.DataFrame, clients: int) -> Prediction:
    """Times to the usual level; where nobody gets there, to the highest of the usual ones that somebody reaches."""
    told = predict(frame, NETWORKS, clients)
    if np.isfinite(told.table["seconds"]).any():
        return told
    reached = [level for level in told.goal.levels if np.isfinite(told.table[told.goal.column(level)]).any()]
    return predict(frame, NETWORKS, clients, max(reached)) if reached else told


def _cell(told: Prediction, network: str, algorithm: str) -> str:
    """One time, and of what it is made."""
    rows = told.on(network)
    (own,) = rows[rows["algorithm"] == algorithm].to_dict("records") or ({"seconds": math.inf},)
    seconds = float(own["seconds"])
    if not math.isfinite(seconds):
        return "never"
    longest = max((value for value in rows["seconds"] if math.isfinite(value)), default=0.0) or 1.0
    bar, at = [], 0.0
    for k, part in enumerate(PARTS):
        width = float(own[f"seconds_{part}"]) / longest * _BAR
        bar.append(f'<rect class="f{k}" x="{at:.1f}" width="{width:.1f}" height="6"/>')
        at += width
    said = text(duration(seconds))
    said = f"<b>{said}</b>" if len(rows) > 1 and seconds == rows["seconds"].min() else said
    return f'{said}<br><svg class="small" width="{_BAR}" height="6" aria-hidden="true">{"".join(bar)}</svg>'
