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
from typing import Any

import numpy as np

from .watch import BUCKETS, Seen

_FINE, _COARSE = 256, 256  # moves kept: the latest one by one; the whole run's, in sums of more and more iterations
_LEAST = 24  # moves from which on anything is said
_LEFT = 0.35  # how much of a swing is left half a period later, at least, for it to count
_LEFT_AT_ONCE = 0.6  # the same where that is the next iteration: noise alone gives a half
_NOISE = 4.5  # standard deviations of a correlation of pure noise
_ALIVE = 1e-3  # how large the last moves are against the largest, at least
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
        """How x swings at the end of the run so far, if it does."""
        whole, late = self._coarse, self._coarse[len(self._coarse) // 2 :]
        for moves, length in (
            (self._fine, 1),
            (self._fine[len(self._fine) // 2 :], 1),
            (whole, self._length),
            (late, self._length),
        ):
            found = swing_of(moves)
            if found is not None and alive(self._coarse):
                return dataclasses.replace(found, half=found.half * length)
        return None

    def saved(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        arrays = {"fine": self._fine, "coarse": self._coarse, "open": self._open}
        text = {name: base64.b64encode(array.tobytes()).decode() for name, array in arrays.items()}
        return {**text, "length": self._length, "opened": self._opened}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what a checkpoint holds."""
        read = lambda name: np.frombuffer(base64.b64decode(saved[name])).reshape(-1, BUCKETS)
        self._fine, self._coarse, self._open = read("fine"), read("coarse"), read("open")[0]
        self._length, self._opened = int(saved["length"]), int(saved["opened"])


def alive(moves: np.ndarray) -> bool:
    """Whether the last eighth of the moves is no small thing against the largest."""
    sizes = np.linalg.norm(moves, axis=1)
    last = sizes[-max(4, len(sizes) // 8) :]
    return bool(len(sizes)) and float(np.sqrt(np.mean(last**2))) > _ALIVE * float(sizes.max())


def swing_of(moves: np.ndarray) -> Swing | None:
    """The swing in a series of moves, (n, numbers); None where they show none."""
    n = len(moves)
    scale = float(np.abs(moves).max(initial=0.0))
    if n < _LEAST or scale == 0:
        return None
    moves = moves / scale
    power = float(np.sum(moves**2))
    together = np.array([np.sum(moves[: n - lag] * moves[lag:]) for lag in range(1, n // 4 + 1)]) / power
    bound = np.full(len(together), max(_LEFT, _NOISE / np.sqrt(n)))
    bound[0] = max(_LEFT_AT_ONCE, bound[0])
    lag = int(np.argmin(together + bound))
    left = -float(together[lag])
    return Swing(lag + 1, min(left, 1.0)) if left > bound[lag] else None
