"""What to say at the end of a run whose x swings: which step makes it.

x is moved along d_x f - J v, and v follows H^-1 d_y f at y, which follows y*(x). Both follow with the same curvature H, so
that their paces tell: the distance that each goes in an iteration along its own residual. A slow swing is one of an x that
something lags behind: the slower of the two by far, or both, and then x is too fast. A swing from one iteration to the next
is of something that oversteps. Where the run can be gone on with other steps it is asked which of them stills it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ..algorithm import Algorithm
from ..component import title_of
from ..engines.base import Carry, Execution, Record
from ..errors import warn
from ..pace.automatic import found_in
from ..watch import attributes, precision
from .blame import changed, followed, gain, rates
from .sentences import advice_for
from .swing import Swing, swing_of

_APART = 3.0  # how far apart paces are where one of the two lags
_CLEARLY = 1.5  # how much faster one of the two is, to be asked first whether it oversteps
_AT_ONCE = 2  # half a period, in iterations, up to which something oversteps
_LATEST = 32  # iterations from which paces are taken
_SHORTEST, _LONGEST = 96, 512  # iterations that a run is gone on for
_STILL = 0.05  # of the size of its moves, at which x has come to rest


@dataclasses.dataclass(frozen=True)
class Cause:
    """A step, whether it is to be raised, and why."""

    field: str
    raised: bool
    why: str


def tell(execution: Execution, algorithm: Algorithm, carry: Carry, swing: Swing, last: Record) -> None:
    """Warn, in a sentence."""
    kind = title_of(algorithm)
    what = f"x swings at the end of this run of {kind}, with a period of about {2 * swing.half} iterations: half a "
    what += f"period later {swing.left:.0%} of a swing is left, so that result.x is a point on its way and no limit"
    if "outer_lr" in found_in(algorithm):
        taken = np.asarray(getattr(last.info, "outer_lr", [np.nan]))[-1]
        warn(f"{what}. Its pace is automatic: let it run longer, or give outer_lr a number (lately {taken:.3g}).")
        return
    told = Swings(execution, algorithm, carry, swing, last).cause()
    warn(f"{what}. {told.why}: {advice_for(algorithm, told.field, told.raised)}.")


class Swings:
    """A run that swings, and what can be asked of it."""

    def __init__(self, execution: Execution, algorithm: Algorithm, carry: Carry, swing: Swing, last: Record):
        self.execution, self.algorithm, self.carry, self.swing = execution, algorithm, carry, swing
        self.follows = followed(algorithm)
        self.paces = paces(carry, last)
        moves = np.asarray(last.seen.moves["x"])[: last.done][-_LATEST:] if last.seen is not None else np.zeros(1)
        self._size = float(np.sqrt(np.mean(moves**2)))

    def cause(self) -> Cause:
        """The step that makes x swing."""
        chosen = self._overstepping() if self.swing.half <= _AT_ONCE else self._lagging()
        if len(chosen) > 1 and self.execution.replays:
            return next((cause for cause in chosen if self._stills(cause)), chosen[-1])
        return chosen[0]

    def _lagging(self) -> list[Cause]:
        why = "x goes faster than y and v can follow"
        upper = [Cause(self._upper(), False, why)]
        y, v = self.paces.get("y"), self.paces.get("v")
        lower, vector = self.follows.get("y"), self.follows.get("v")
        if y and v and vector and v * _APART < y:
            return [Cause(vector, True, "v lags far behind y, and x answers too late"), *upper]
        if y and v and lower and y * _APART < v:
            return [Cause(lower, True, "y lags far behind v, and x answers too late"), *upper]
        return upper

    def _overstepping(self) -> list[Cause]:
        """What may overstep: the faster of y and v where one is, else x itself, which stands last too."""
        y, v = self.paces.get("y") or 0.0, self.paces.get("v") or 0.0
        lower, vector = self.follows.get("y"), self.follows.get("v")
        upper = Cause(self._upper(), False, "x oversteps from one iteration to the next")
        found = [(v, vector, "v"), (y, lower, "y")] if v >= y else [(y, lower, "y"), (v, vector, "v")]
        others = [
            Cause(f, False, f"{n} oversteps from one iteration to the next, and x with it") for _, f, n in found if f
        ]
        clear = found[0][0] > _CLEARLY * found[1][0]
        return [*others, upper] if others and clear else [upper, *others, upper]

    def _upper(self) -> str:
        upper, optimizer = self.follows.get("x", ""), self.follows.get("optimizer")
        faster = optimizer and gain(getattr(self.algorithm, optimizer)) > rates(self.algorithm).get(upper, 0.0)
        return optimizer if optimizer and faster else upper

    def _stills(self, cause: Cause) -> bool:
        """Whether x comes to rest, or goes steadily, with another value of this step."""
        now = rates(self.algorithm).get(cause.field)
        if now is None:
            return False
        length = int(np.clip(16 * self.swing.half, _SHORTEST, _LONGEST))
        for factor in (3.0, 10.0) if cause.raised else (1 / 3,):
            other = changed(self.algorithm, cause.field, now * factor)
            _, record = self.execution.advance(other, self.carry, length, np.inf)
            if record.finite and record.seen is not None and self._calm(record, 1.0 if cause.raised else factor):
                return True
        return False

    def _calm(self, record: Record, factor: float) -> bool:
        assert record.seen is not None
        late = np.asarray(record.seen.moves["x"])[-record.done // 4 :]
        rest = float(np.sqrt(np.mean(late**2))) <= _STILL * factor * self._size
        sketch = np.asarray(record.seen.sketch)
        real = np.asarray(record.seen.moves["x"]) > 8 * precision(self.carry.state.x) * np.asarray(
            record.seen.sizes["x"]
        )
        return rest or swing_of(np.where(real[:, None], sketch, 0.0)[record.done // 2 :], 4) is None


def paces(carry: Carry, last: Record) -> dict[str, float]:
    """How far y and v go in an iteration along their residuals, lately; only what was measured."""
    info, seen, found = last.info, last.seen, {}
    pull = float(np.asarray(attributes(carry.state).get("pull", np.nan)))
    measured = {"y": getattr(info, "lower_gradient_norm", None), "v": getattr(info, "vector_residual", None)}
    for part, residual in measured.items():
        if residual is None or seen is None or part not in seen.moves:
            continue
        moves, sizes = (np.asarray(of)[-_LATEST:] for of in (seen.moves[part], residual))
        sizes = sizes * (pull if part == "v" else 1.0)
        ratios = moves[sizes > 0] / sizes[sizes > 0]
        if ratios.size:
            found[part] = float(np.median(ratios))
    return {part: pace for part, pace in found.items() if np.isfinite(pace)}
