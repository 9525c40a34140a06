"""`fedbilevel reproduce tuning`: ours and rivals as users would run them, every round paid.

All contenders have the same rounds on the same task, and train y with the same `fb.train`, which
finds its own step. What a contender returns is an x; it is judged outside of its budget, with y
trained to y*(x).
"""

from __future__ import annotations

from pathlib import Path

from ..kinds import DataDir
from . import report, search
from .plan import NAME as NAME
from .plan import QUICK, SUMMARY, WHOLE
from .runs import Telling, run


def tuning(folder: Path, quick: bool, data_dir: DataDir, say: Telling) -> list[Path]:
    """The study; leaves tuning.csv, tuning.md, tuning-race.md and tuning.png.

    Raises:
        InputError: the folder holds another study, or data are missing.
    """
    frame = run(QUICK if quick else WHOLE, folder, data_dir, say)
    return report.write(frame, folder, () if search.has_optuna() else (search.INSTALL,))
