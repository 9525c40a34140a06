"""Whether x swings: seen in how its moves correlate with each other some iterations apart, and told at the end of a run.

A swing comes back on itself: half a period later x moves the other way. So with m_k the move of x in iteration k

    C(L) = sum_k m_k . m_{k+L} / sum_k |m_k|^2

is -exp(-damping) there: the share of a swing that is left half a period later. It is about zero at every lag where moves
are noise of minibatches (or more than -1/2 at lag one, where that noise alone moves x back and forth), and above zero where
x goes steadily. A swing that has died away by the end of the run, or is rounding, is none: x has settled.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping

import numpy as np

from ..given import JSON
from ..watch import BUCKETS, Seen

_FINE, _COARSE = 256, 256  # moves kept: the latest one by one; the whole run's, in sums of more and more iterations
_LEAST = 24  # moves from which on anything is said
_LEFT = 0.4  # how much of a swing is left half a period later, at least, for it to count
_LEFT_OF_A_LONG_ONE = 0.3  # the same where a run saw it three times at most: noise leaves no such long trace
_LEFT_AT_ONCE = 0.6  # the same where that is the next iteration: noise alone gives a half
_NOISE = 4.5  # standard deviations of a correlation of pure noise
_ALIVE = 1e-3  # how wide the last swings are against how far x has been, at least
_ROUNDING = 8.0  # units in the last place of x that count as no move


@dataclasses.dataclass(frozen=True)
class Swing:
    """x swings: `half` is half its period in iterations, `left` how much of a swing is left after that time."""

    half: int
    left: float


class Trail:
    """The moves of x over a run: the latest one by one, and all of them in sums of equally many iterations."""

    def __init__(self) -> None:
        self._fine = np.zeros((0, BUCKETS))
        self._coarse, self._length = np.zeros((0, BUCKETS)), 1
        self._open, self._opened = np.zeros(BUCKETS), 0  # the sum that is being made, and of how many

    def add(self, seen: Seen, done: int, precision: float) -> np.ndarray:
        """Hear of `done` more iterations: for each the cosine of the angle between its move of x and the one before.

        NaN where one of the two is none, or rounding. `precision` is the distance from one to the next number of x's.
        """
        moves, sizes = (np.asarray(of["x"], float)[:done] for of in (seen.moves, seen.sizes))
        sketch = np.asarray(seen.sketch, float)[:done]
        real = moves > _ROUNDING * precision * sizes
        sketch = np.where(real[:, None], sketch, 0.0)
        before = np.concatenate([self._fine[-1:] if len(self._fine) else np.zeros((1, BUCKETS)), sketch[:-1]])
        lengths = np.linalg.norm(sketch, axis=1) * np.linalg.norm(before, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            turns = np.where(lengths > 0, np.clip((sketch * before).sum(1) / lengths, -1, 1), np.nan)
        self._fine = np.concatenate([self._fine, sketch])[-_FINE:]
        for move in sketch:
            self._extend(move)
        return turns

    def _extend(self, move: np.ndarray) -> None:
        self._open, self._opened = self._open + move, self._opened + 1
        if self._opened < self._length:
            return
        self._coarse = np.concatenate([self._coarse, self._open[None]])
        self._open, self._opened = np.zeros(BUCKETS), 0
        if len(self._coarse) == _COARSE:
            self._coarse, self._length = self._coarse[::2] + self._coarse[1::2], 2 * self._length

    def swing(self) -> Swing | None:
        """How x swings at the end of the run so far, if it does: in a few iterations, or over the run."""
        late = self._coarse[len(self._coarse) // 2 :]
        looks = (self._fine[len(self._fine) // 2 :], 16, 1), (self._fine, 8, 1), (late, 8, self._length)
        for moves, share, length in (*looks, (self._coarse, 3, self._length)):
            found = swing_of(moves, share)
            if found is not None and alive(moves, found.half, self._extent()):
                return dataclasses.replace(found, half=found.half * length)
        return None

    def _extent(self) -> float:
        """How far apart the places are where x has been."""
        places = np.cumsum(np.concatenate([np.zeros((1, BUCKETS)), self._coarse, self._open[None]]), axis=0)
        return float(np.linalg.norm(np.ptp(places, axis=0)))

    def saved(self) -> dict[str, JSON]:
        """All of it, for a checkpoint."""
        arrays = {"fine": self._fine, "coarse": self._coarse, "open": self._open}
        text = {name: base64.b64encode(array.tobytes()).decode() for name, array in arrays.items()}
        return {**text, "length": self._length, "opened": self._opened}

    def restore(self, saved: Mapping[str, JSON]) -> None:
        """Go on from what a checkpoint holds."""
        read = lambda name: np.frombuffer(base64.b64decode(str(saved[name]))).reshape(-1, BUCKETS)
        self._fine, self._coarse, self._open = read("fine"), read("coarse"), read("open")[0]
        self._length, self._opened = int(str(saved["length"])), int(str(saved["opened"]))


def alive(moves: np.ndarray, half: int, extent: float) -> bool:
    """Whether x still swings in the end, by more than a trifle of how far it has been."""
    last = moves[-max(4, len(moves) // 8) :]
    return float(np.sqrt(np.mean(np.sum(last**2, axis=1)))) * half > _ALIVE * extent


def swing_of(moves: np.ndarray, share: int) -> Swing | None:
    """The swing in a series of moves, (n, numbers), with half a period of up to n / share; None where they show none."""
    n = len(moves)
    scale = float(np.abs(moves).max(initial=0.0))
    if n < _LEAST or scale == 0:
        return None
    moves = moves / scale
    power = float(np.sum(moves**2))
    lags = np.arange(1, n // share + 1)
    left = -np.array([np.sum(moves[: n - lag] * moves[lag:]) for lag in lags]) / power
    usual = np.where(lags > n / 6, _LEFT_OF_A_LONG_ONE, _LEFT)
    bound = np.maximum(np.where(lags == 1, _LEFT_AT_ONCE, usual), _NOISE / np.sqrt(n))
    beyond = np.flatnonzero(left > bound)
    if not len(beyond):
        return None
    lag = beyond[0]  # the first time that x comes back, and how far it then goes
    while lag + 1 < len(left) and left[lag + 1] > left[lag]:
        lag += 1
    return Swing(int(lag) + 1, min(float(left[lag]), 1.0))
