"""What is asked of one run's values of a metric: which way is up, and when a level is reached."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

Values = ArrayLike  # of one run, in order: an array, a column of a table, or a list


def direction(metric: str) -> int:
    """1 for a metric that is to rise (its name ends in "accuracy"), -1 for one that is to fall."""
    return 1 if metric.endswith("accuracy") else -1


def first_reached(values: Values, level: float, window: int = 5) -> int | None:
    """Index of the first evaluation at which the median of the last `window` ones is at the level; None for never.

    One run's values in order; of a metric that falls, pass -values and -level. A run with fewer evaluations than `window` is
    judged by all of them, at its end.
    """
    medians = running_median(values, window)
    reached = np.flatnonzero(medians >= level)
    return int(reached[0]) + np.size(values) - len(medians) if reached.size else None


def running_median(values: Values, window: int = 5) -> np.ndarray:
    """Medians of each `window` consecutive values, or of all if there are fewer."""
    values = np.asarray(values, float)
    return np.median(np.lib.stride_tricks.sliding_window_view(values, min(window, len(values))), axis=-1)
