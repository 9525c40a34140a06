"""Who takes part, by name: what each does with a purse, and with which lengths of run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from .fedex import fedex
from .grounds import Ground
from .hyperband import hyperband
from .ours import ours, tuned
from .purse import Point, Purse
from .search import at_random, tpe

LENGTHS = (10, 30, 60)  # rounds of a search's run; the best of them is what counts
FIXED = 100  # rounds of training at an x that nobody tunes


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to choose x.

    Attributes:
        label: its name in tables.
        run: (purse, length, seed) -> None; it spends from the purse, whose trail says its x.
        lengths: of its runs in rounds, of which the best counts; (0,) where it has none.
        takes: the grounds it can work on.
        optuna: whether it needs Optuna.
    """

    label: str
    run: Callable[[Purse, int, int], None]
    lengths: tuple[int, ...] = (0,)
    takes: Callable[[Ground], bool] = lambda ground: True
    optuna: bool = False


def _fixed(purse: Purse, by_hand: bool) -> None:
    hand = purse.ground.by_hand
    x = hand(purse.task) if by_hand and hand is not None else purse.task.x
    purse.train(x, purse.task.y, min(FIXED, purse.budget - 1))
    purse.trail[:] = [Point(0, 0, x)]  # x is there from the start


UNTUNED, BY_HAND, OURS, TUNE = "no tuning", "by hand", "ours", "fb.tune"

CONTENDERS: tuple[Contender, ...] = (
    Contender(UNTUNED, lambda purse, length, seed: _fixed(purse, False)),
    Contender(
        BY_HAND,
        lambda purse, length, seed: _fixed(purse, True),
        takes=lambda ground: ground.by_hand is not None,
    ),
    Contender("random search", at_random, LENGTHS),
    Contender("TPE", tpe, LENGTHS, optuna=True),
    Contender("Hyperband", hyperband, LENGTHS),
    Contender("FedEx", fedex, (60, 300)),
    Contender(OURS, lambda purse, length, seed: ours(purse)),
    Contender(TUNE, lambda purse, length, seed: tuned(purse)),
)
RIVALS = tuple(c.label for c in CONTENDERS if c.label not in (OURS, TUNE))
