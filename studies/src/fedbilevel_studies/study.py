"""A study as data: contenders on one task, each at its best step sizes from one equal grid, then over several seeds.

`stages.run` takes it through three stages, and goes on where it was interrupted:

1. the grid, on seeds of its own (grid.csv), and each contender's best point of it (settings.toml): `search.py`;
2. the seeds (runs/LABEL-SEED, history.csv), and beside them the share of the implicit part of the hypergradient
   (shares.csv): `stages.py`, `shares.py`;
3. tables and figures: `tables.py`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Literal

from fedbilevel import Algorithm, Simulation
from fedbilevel.algorithms import ALGORITHMS
from fedbilevel.tasks import TASKS, Options, Task
from fedbilevel.tune import points

from .kinds import JSON, DataDir, Setting

_STILL = {"outer_lr": 1e-30, "hessian_lr": 0.01}  # the steps of a reference line that leaves x where it is


@dataclasses.dataclass(frozen=True)
class Contender:
    """An algorithm in a study.

    Attributes:
        label: its name in tables and figures.
        algorithm: its name on the command line.
        settings: counts and options (and step sizes that its grid leaves alone).
        variants: counts and options that the grid chooses among, as it does among step sizes.
        grid: values to try that are its own, in place of the study's.
        rounds: of its final runs, where fewer than the study's are enough to see its end.
        kind: "rival"; or a reference line: "frozen", x stays as it is; "pooled", one client holds all data.
    """

    label: str
    algorithm: str
    settings: Mapping[str, Setting]
    kind: Literal["rival", "frozen", "pooled"] = "rival"
    variants: tuple[Mapping[str, Setting], ...] = ({},)
    grid: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    rounds: int | None = None

    def build(self, chosen: Mapping[str, Setting]) -> Algorithm:
        """The algorithm with these step sizes, and the variant's settings."""
        still = _STILL if self.kind == "frozen" else {}
        return ALGORITHMS[self.algorithm](**{**self.settings, **chosen, **still})


@dataclasses.dataclass(frozen=True)
class Study:
    """What to compare, on what, and how long.

    Attributes:
        name, summary: what it is called, and a line about it.
        task, options, cohort: the task by name and how to build it (seeds apart); clients an exchange.
        contenders: who takes part.
        grid: step sizes to try, equal for all but for those of a contender's own.
        grid_rounds, grid_seeds: the budget of a grid run, and the seeds it is judged on.
        beyond: how many times the grid goes on from its best point to that one's neighbours.
        shortlist, shortlist_seeds: how many of its best points are run again, for `rounds`, and on which seeds; as many more
            where none of them holds on all.
        rounds, seeds: of the final runs.
        metric, levels, goal: what is measured, the levels that tables name, and the one that judges the grid.
        pairs: (one, other) labels whose rounds are compared seed by seed.
        shares: iterations between looks at the share of the implicit part; 0 for none.
        every: iterations between evaluations.
    """

    name: str
    summary: str
    task: str
    options: Options
    cohort: int | None
    contenders: tuple[Contender, ...]
    grid: Mapping[str, tuple[float, ...]]
    grid_rounds: int
    grid_seeds: tuple[int, ...]
    rounds: int
    seeds: tuple[int, ...]
    metric: str = "test_accuracy"
    levels: tuple[float, ...] = (0.80, 0.85, 0.88, 0.90, 0.93)
    goal: float = 0.90
    pairs: tuple[tuple[str, str], ...] = ()
    shares: int = 20
    every: int = 1
    beyond: int = 0
    shortlist: int = 1
    shortlist_seeds: tuple[int, ...] = ()

    def build(self, contender: Contender, seed: int, data_dir: DataDir) -> tuple[Task, Simulation]:
        """A contender's task for one seed, and its engine."""
        options = dataclasses.replace(self.options, seed=seed, data_dir=data_dir)
        if contender.kind == "pooled":
            return TASKS[self.task](dataclasses.replace(options, clients=1, partition="iid", alpha=None)), Simulation()
        return TASKS[self.task](options), Simulation(cohort=self.cohort)

    @property
    def clients_an_exchange(self) -> int:
        """How many clients a rival asks."""
        return self.cohort or self.options.clients or 1

    def sizes(self, contender: Contender) -> tuple[int, int]:
        """How many clients there are for the contender, and how many an exchange asks of its cohort."""
        clients = 1 if contender.kind == "pooled" else self.options.clients or 1
        return clients, min(self.cohort or clients, clients)

    def budget(self, label: str) -> int:
        """The rounds of a contender's final runs."""
        return next(c.rounds for c in self.contenders if c.label == label) or self.rounds

    def rates(self, contender: Contender) -> dict[str, tuple[float, ...]]:
        """The contender's grid: the study's or its own, but for what it leaves alone or does not have."""
        idle = set(_STILL) if contender.kind == "frozen" else set()
        has = {field.name for field in dataclasses.fields(ALGORITHMS[contender.algorithm])}
        tried = {**self.grid, **contender.grid}
        return {name: tried[name] for name in tried if name in has - idle - set(contender.settings)}

    def candidates(self, contender: Contender) -> list[dict[str, Setting]]:
        """Everything that the grid tries: each variant at each point of step sizes."""
        return [{**variant, **point} for variant in contender.variants for point in points(self.rates(contender))]

    def to_dict(self) -> dict[str, JSON]:
        """Everything that decides the numbers, as plain values."""
        plain = dataclasses.asdict(self)
        plain["options"] = {k: v for k, v in plain["options"].items() if k not in ("seed", "data_dir")}
        # as before these were there: what is finished stays valid
        for contender in plain["contenders"]:
            if not contender["grid"]:
                del contender["grid"]
        if not plain["beyond"]:
            del plain["beyond"]
        return json.loads(json.dumps(plain))
