"""Why it works: studies on closed-form tasks, each point held against its formula.

A study is a function (folder, quick, progress) -> files: NAME.csv, NAME.md, NAME.png, and NAME.json, which says with what
settings the table was made; one that is there already with the same settings is used again. `progress` takes a line of text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .common import Progress
from .components import ablation
from .estimator import bias, q_variance
from .rounds import rounds_ratio
from .schedules import rounds_table
from .speedup import speed_up
from .spread import heterogeneity
from .stationarity import stationarity
from .unequal import unequal_steps

Study = Callable[[Path, bool, Progress], list[Path]]

THEORY: dict[str, tuple[str, Study]] = {
    "heterogeneity": (
        "hypergradients as clients grow apart: a floor for LFedNest alone",
        heterogeneity,
    ),
    "q-variance": ("the second moment over Q: linear in N, below its bound", q_variance),
    "bias": ("the bias of AggITD's estimator, and its closed form", bias),
    "rounds-ratio": ("rounds of AggITD over those of FedNest at T = N, and (2N+3)/(3N+3)", rounds_ratio),
    "rounds-table": ("rounds to a stationary point, method by method, all clients and cohorts", rounds_table),
    "stationarity": ("every method on heterogeneous ridge tuning: to zero, or to a floor", stationarity),
    "unequal-steps": ("unequal numbers of local steps: SimFBO solves another problem, ShroFBO does not", unequal_steps),
    "speed-up": (
        "larger cohorts: a floor that falls with the variance of their mean, none, or one that stays",
        speed_up,
    ),
    "ablation": ("turns, local steps, cohort and truncation of AggITD; one cohort for all exchanges", ablation),
}
