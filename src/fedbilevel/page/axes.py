"""Scales of figures: ticks at round numbers, linear or logarithmic."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

DECADES = 2.0  # a figure whose values are all positive and span more is logarithmic
_TICKS = 4  # about as many on an axis


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a panel.

    Attributes:
        low, high: the values at its ends; of a logarithmic one both positive.
        start, end: where these lie in the picture.
        logarithmic: whether it is.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, values: np.ndarray) -> np.ndarray:
        """Where values lie in the picture."""
        scaled = lambda value: np.log10(value) if self.logarithmic else value
        low, high = scaled(self.low), scaled(self.high)
        return np.asarray(self.start + (scaled(values) - low) / ((high - low) or 1.0) * (self.end - self.start))

    def spot(self, value: float) -> float:
        """Where one value lies."""
        return float(self.at(np.array(value)))

    def ticks(self) -> list[tuple[float, str]]:
        """Round values on it, and how they are written."""
        if not self.logarithmic:
            return [(value, f"{value:.6g}") for value in _round_between(self.low, self.high)]
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        by = max(1, math.ceil((last - first) / _TICKS))
        return [(10.0**k, f"1e{k}") for k in range(first, last + 1, by)]


def _round_between(low: float, high: float) -> list[float]:
    if not high > low:
        return [low]
    rough = (high - low) / _TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * many for many in (1, 2, 2.5, 5, 10) if unit * many >= rough * 0.999)
    ends = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [0.0 if k == 0 else k * step for k in range(ends[0], ends[1] + 1)]


def vertical(values: np.ndarray, start: float, end: float) -> Axis:
    """An axis for values: logarithmic where they are all positive and span more than two decades."""
    there = values[np.isfinite(values)]
    low, high = (float(there.min()), float(there.max())) if there.size else (0.0, 1.0)
    if low > 0 and high > low * 10**DECADES:
        return Axis(10 ** (math.log10(low) - 0.1), 10 ** min(math.log10(high) + 0.1, 308.0), start, end, True)
    room = 0.05 * (high - low) if high > low else 0.05 * abs(low) or 0.05
    return Axis(low - room, high + room, start, end)
