"""The second exchange: count, mean and centred sum of squares of columns, and how those of several clients are one.

Merged pairwise (Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979):

    count = a.count + b.count,    d = b.mean - a.mean
    mean = a.mean + d b.count / count
    centred = a.centred + b.centred + d^2 a.count b.count / count

A mean is two float64, of which the second is what the first does not hold: around 1e9 a float64 is off by 1e-7, and the
means of clients that differ by less than a deviation would differ by that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float64


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of the numbers of a column that are not missing.

    Attributes:
        count: how many there are.
        mean: of them, to a float64; 0 where there are none.
        rest: what `mean` lacks.
        centred: the sum of the squares of v - mean.
    """

    count: int = 0
    mean: float = 0.0
    rest: float = 0.0
    centred: float = 0.0

    @classmethod
    def of(cls, values: Float64[np.ndarray, " rows"]) -> Moments:
        """Those of numbers, none of them missing."""
        if not len(values):
            return cls()
        first = float(values[0])  # near enough to all: what is left of them is exact to its own size
        apart = values - first
        mean = float(apart.mean())
        off = apart - mean
        centred = float((off * off).sum() - off.sum() ** 2 / len(values))
        return cls(len(values), *_sum(first, mean), max(centred, 0.0))

    def merged(self, other: Moments) -> Moments:
        """Those of both one's numbers."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        apart = (other.mean - self.mean) + (other.rest - self.rest)
        mean = _sum(self.mean, self.rest + apart * (other.count / count))
        between = apart * apart * (self.count * (other.count / count))
        return Moments(count, *mean, self.centred + other.centred + between)

    @property
    def deviation(self) -> float:
        """The root of the mean square of v - mean; 0 where all are the same, or there are none."""
        return float(np.sqrt(self.centred / self.count)) if self.count else 0.0


def merged(parts: Iterable[Moments]) -> Moments:
    """The moments of all, one after the other."""
    found = Moments()
    for part in parts:
        found = found.merged(part)
    return found


def _sum(one: float, other: float) -> tuple[float, float]:
    """(Their sum to a float64, what that lacks), exactly (Knuth's two-sum)."""
    total = one + other
    back = total - one
    return total, (one - (total - back)) + (other - back)
