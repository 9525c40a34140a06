"""The study as data: grounds, contenders, seeds and the budget; and its quick form."""

from __future__ import annotations

import dataclasses

from ..kinds import JSON
from .contenders import CONTENDERS, Contender
from .grounds import GROUNDS, Ground

NAME = "tuning"
SUMMARY = "tuning x: ours against values by hand, search and FedEx, every round paid"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        grounds, contenders, seeds: each of the contenders on each ground with each seed.
        budget: rounds that a contender may spend.
    """

    grounds: tuple[Ground, ...]
    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    budget: int = 300

    def runs(self) -> list[tuple[Ground, int, Contender, int]]:
        """(ground, seed, contender, length of its runs) of every run, in order."""
        return [
            (ground, seed, contender, length)
            for ground in self.grounds
            for seed in self.seeds
            for contender in self.contenders
            if contender.takes(ground)
            for length in contender.lengths
        ]

    def to_dict(self) -> dict[str, JSON]:
        """Everything that decides the numbers, as plain values."""
        return {
            "study": NAME,
            "grounds": [ground.to_dict() for ground in self.grounds],
            "contenders": {c.label: list(c.lengths) for c in self.contenders},
            "seeds": list(self.seeds),
            "budget": self.budget,
        }


WHOLE = Plan(tuple(GROUNDS.values()), CONTENDERS, (0, 1, 2, 3, 4))
QUICK = Plan((GROUNDS["bank"],), CONTENDERS, (0,))
