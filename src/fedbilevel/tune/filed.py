"""Searches for the algorithms of a plan, and what they found on its way into the store."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from .. import store
from ..algorithm import Algorithm, Setting
from ..callbacks.progress import Meter
from ..compare import Plan, describe
from ..errors import check
from ..given import JSON
from .search import Found, search


@dataclasses.dataclass(frozen=True)
class Filed:
    """What a search found for one algorithm of a plan.

    Attributes:
        name: the algorithm's, on the command line.
        where: the task and the data set, by which the store keeps it; None where a run does not take it from there.
        settings: the step sizes, and what else was not the class's default.
        found: the search's result.
        how: the conditions, for whoever reads the store.
    """

    name: str
    where: tuple[str, str] | None
    settings: Mapping[str, Setting]
    found: Found
    how: Mapping[str, str | float | int]

    def keep(self) -> Path | None:
        """Put it into the user's store; returns the file, or None where it does not belong there."""
        return None if self.where is None else store.put(*self.where, self.name, self.settings, self.how)

    def plain(self) -> dict[str, JSON]:
        """As plain values."""
        found = self.found
        return {
            "algorithm": self.name, **found.settings, found.metric: found.score, "tried": len(found.tried),
            "edge": list(found.edge),
        }  # fmt: skip


def searched(
    plan: Plan, grid: Mapping[str, Sequence[float]] | None = None, metric: str | None = None, quiet: bool = False
) -> list[Filed]:
    """Search for every algorithm of a plan, on its seeds.

    Args:
        grid, metric: as `search`; of a grid an algorithm takes the step sizes that it has.
        quiet: whether no progress is shown.

    Raises:
        InputError, RunError: as `search`.
    """
    check(plan.engine == "simulation", "a search runs in simulation, many points in one program.")
    has = {name: {f.name for f in dataclasses.fields(plan.choose(name).algorithm)} for name in plan.algorithms}
    for step in grid or {}:
        known = sorted(set().union(*has.values()))
        check(step in known, f"none of {', '.join(has)} has a step size {step!r}.")
    filed = []
    with jax.enable_x64(plan.precision == 64):
        tasks = {seed: plan.source.build(seed) for seed in plan.seeds}
        for name in plan.algorithms:
            runs = [plan.describe(task, name, seed) for seed, task in tasks.items()]
            own = None if grid is None else {step: values for step, values in grid.items() if step in has[name]}
            if quiet:
                found = search(runs, own, metric=metric)
            else:
                with Meter(f"{name}: search", 1.0) as meter:
                    found = search(runs, own, metric=metric, progress=meter.update)
            filed.append(
                Filed(name, plan.source.filed(name), _settings(runs[0].algorithm, found), found, _how(plan, found))
            )
    return filed


def _settings(algorithm: Algorithm, found: Found) -> dict[str, Setting]:
    """The step sizes, every count, and what else is not the class's default."""
    usual, counts = describe(type(algorithm)()), {f.name for f in dataclasses.fields(algorithm) if _is_count(f)}
    plain: dict[str, Setting] = {
        name: value
        for name, value in describe(algorithm).items()
        if isinstance(value, bool | int | float | str) and (name in counts or value != usual[name])
    }
    return plain | found.settings


def _is_count(field: dataclasses.Field) -> bool:
    return field.metadata.get("role") == "count"


def _how(plan: Plan, found: Found) -> dict[str, str | float | int]:
    """Where, how long and how it was judged."""
    given: dict[str, str | float | int | None] = {
        "metric": found.metric, "score": found.score, "tried": len(found.tried), "rounds": plan.rounds,
        "iterations": plan.iterations, "cohort": plan.cohort, "seeds": " ".join(map(str, plan.seeds)),
        "on": datetime.date.today().isoformat(),
    }  # fmt: skip
    return {name: value for name, value in given.items() if value is not None}
