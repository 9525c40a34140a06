"""A run or a comparison: algorithms and seeds on one source, each run kept in a folder.

A comparison goes through its (algorithm, seed) pairs in order and keeps each finished one, so that an interrupted one goes
on where it stopped. `results/folder.py` says what the folder holds.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from .algorithm import Algorithm, Setting
from .callbacks import Callback, Progress
from .cohorts import check_cohort
from .description import Description
from .engines import ENGINES
from .engines.base import Engine
from .engines.faults import Faults
from .engines.simulated.room import IN_MEMORY
from .errors import RunError, check, unknown_name, with_notes
from .given import JSON
from .identity import said
from .result import History, Result
from .results import folder as folders
from .results.kept import keep
from .settings import Chosen, chosen
from .tasks import TASKS, Options, Task
from .tasks.base import Kind


@typing.runtime_checkable
class Source(typing.Protocol):
    """What algorithms run on: a task that ships with the library, or an application's sample data."""

    @property
    def name(self) -> str: ...

    @property
    def faults(self) -> Faults | None: ...  # for engines where clients can fail

    @property
    def callbacks(self) -> Sequence[Callback] | Callable[[], Sequence[Callback]]: ...

    def build(self, seed: int) -> Task: ...

    def choose(self, algorithm: str, given: Mapping[str, Setting]) -> Chosen: ...

    def filed(
        self, algorithm: str
    ) -> tuple[str, str] | None: ...  # (task, data set) by which the store keeps its steps

    def config(self) -> dict[str, JSON]: ...  # for config.json: what it is


@dataclasses.dataclass(frozen=True)
class Shipped:
    """A task that ships with the library.

    Attributes:
        name, options: the task's name, and how to build it (its seed apart).
    """

    name: str
    options: Options
    faults: Faults | None = None
    callbacks: Sequence[Callback] = ()

    def build(self, seed: int) -> Task:
        """The task for one seed."""
        return self._kind(dataclasses.replace(self.options, seed=seed))

    def choose(self, algorithm: str, given: Mapping[str, Setting]) -> Chosen:
        """An algorithm with the best known settings, overridden by the user's."""
        return chosen(algorithm, self.filed(algorithm), given)

    def filed(self, algorithm: str) -> tuple[str, str]:
        """The task, with its model where that is not the default, and the data set."""
        model = self.options.model
        plain = model is None or model in self._kind.models[:1]
        return (self.name if plain else f"{self.name}-{model}"), self._dataset

    def config(self) -> dict[str, JSON]:
        """The task's name and options, but for the seed and where its files lie."""
        options = {k: v for k, v in dataclasses.asdict(self.options).items() if k not in ("seed", "data_dir")}
        if options["model"] is None:
            del options["model"]  # as folders have it that are older than this option
        return {"task": self.name, "options": options | {"dataset": self._dataset}}

    @property
    def _kind(self) -> Kind:
        if self.name not in TASKS:
            raise unknown_name("task", self.name, TASKS)
        return TASKS[self.name]

    @property
    def _dataset(self) -> str:
        return self.options.dataset or self._kind.datasets[0]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        source: on what.
        algorithms: name -> settings given by the user.
        seeds: the seeds to run each algorithm with.
        iterations, rounds: one of the two.
        cohort, engine, evaluate_every, precision: how to run.
        check: whether the problem is looked at first.
        compile: how a simulation is compiled (see `Simulation`).
        client_state: where a simulation's clients' states lie; numbers do not depend on it.
        alone: whether its one run lies in the folder itself, as an application's does.
        keep: by what the best x and y are kept, as in "test_loss:min".
    """

    source: Source
    algorithms: dict[str, dict[str, Setting]]
    seeds: tuple[int, ...]
    iterations: int | None = None
    rounds: int | None = None
    cohort: int | None = None
    engine: str = "simulation"
    evaluate_every: int = 1
    precision: int = 32
    check: bool = True
    alone: bool = False
    compile: str = "auto"
    client_state: str = IN_MEMORY
    keep: str | None = None

    def choose(self, name: str) -> Chosen:
        """An algorithm with its settings, and where its step sizes come from."""
        return self.source.choose(name, self.algorithms[name])

    @property
    def steps(self) -> dict[str, str]:
        """Where each algorithm's step sizes come from."""
        return {name: self.choose(name).steps for name in self.algorithms}

    def first(self) -> Task:
        """The task of the first seed, at the plan's precision."""
        with jax.enable_x64(self.precision == 64):
            return self.source.build(self.seeds[0])

    def build_engine(self) -> Engine:
        """The engine."""
        if self.engine not in ENGINES:
            raise unknown_name("engine", self.engine, ENGINES)
        kind, faults = ENGINES[self.engine], self.source.faults
        fail = {"faults": faults} if faults is not None and hasattr(kind, "faults") else {}
        asked = {"compile": (self.compile, "auto"), "client_state": (self.client_state, IN_MEMORY)}
        for word, (value, usual) in asked.items():
            check(
                hasattr(kind, word) or value == usual,
                f"{word}= is for the simulation, not for the engine {self.engine}: leave it out.",
            )
        own = {word: value for word, (value, _) in asked.items() if hasattr(kind, word)}
        return kind(**{"cohort": self.cohort, **fail, **own})

    def describe(self, task: Task, name: str, seed: int) -> Description:
        """One of its runs."""
        return task.describe(
            self.choose(name).algorithm, iterations=self.iterations, rounds=self.rounds, engine=self.build_engine(),
            evaluate_every=self.evaluate_every, check=self.check, callbacks=self.source.callbacks, keep=self.keep,
            name=self.source.name if self.alone else f"{name}, seed {seed}",
        )  # fmt: skip

    def place(self, folder: Path, name: str, seed: int) -> Path:
        """Where one of its runs is kept."""
        return folder if self.alone else folder / folders.RUNS / f"{name}-{seed}"

    def config(self, clients: int) -> dict[str, JSON]:
        """For config.json: every setting that decides the numbers, the algorithms' fields in full, and whose steps they are.

        `clients` is how many there are; with the cohort it says how many an exchange asks.
        """
        how = ("iterations", "rounds", "cohort", "engine", "evaluate_every", "precision")
        return {
            **self.source.config(),
            "algorithms": {name: describe(self.choose(name).algorithm) for name in self.algorithms},
            "steps": {**self.steps},
            "seeds": list(self.seeds),
            **{name: getattr(self, name) for name in how},
            **({} if self.compile == "auto" else {"compile": self.compile}),  # as folders of earlier versions have it
            **({} if self.keep is None else {"keep": self.keep}),
            "clients_an_exchange": check_cohort(self.cohort, clients),
        }

    def open(self, out: str | os.PathLike[str], clients: int, resume: bool, overwrite: bool) -> Path:
        """The folder for its results, with config.json; `clients` is how many there are.

        Raises:
            InputError: as `results.folder.opened`.
        """
        return folders.opened(out, self.config(clients), resume=resume, overwrite=overwrite, alone=self.alone)


def describe(algorithm: Algorithm) -> dict[str, JSON]:
    """An algorithm's fields as plain values."""
    plain = lambda value: value if value is None or isinstance(value, bool | int | float | str) else said(value)
    fields = {f.name: getattr(algorithm, f.name) for f in dataclasses.fields(algorithm)}
    return {k: (v.value if v.mode == "fixed" else v.mode) if k == "truncation" else plain(v) for k, v in fields.items()}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one (algorithm, seed) went: its history, and the sentence it failed with, if it did."""

    algorithm: str
    seed: int
    history: History
    failure: str | None
    result: Result | None

    @property
    def stopped(self) -> str | None:
        """The reason for which a callback stopped it, if one did."""
        return self.history.stopped


def run_all(
    plan: Plan, folder: Path | None, resume: bool, quiet: bool = False, first: Task | None = None
) -> list[Outcome]:
    """Run every (algorithm, seed) of the plan; one that blows up is kept as far as it came, and the others still run.

    Args:
        first: the task of the first seed, if it is built already (`Plan.first`).
    """
    outcomes = []
    with jax.enable_x64(plan.precision == 64):
        for seed in plan.seeds:
            task, first = plan.source.build(seed) if first is None else first, None
            for name in plan.algorithms:
                try:
                    outcomes.append(_one(plan, task, name, seed, folder, resume, quiet))
                finally:  # also after Ctrl-C: what there is so far can be looked at
                    if folder is not None and not plan.alone:
                        gather(plan, folder)
    return outcomes


def _one(plan: Plan, task: Task, name: str, seed: int, folder: Path | None, resume: bool, quiet: bool) -> Outcome:
    run = plan.describe(task, name, seed)
    try:
        if folder is None:
            result = run.run(callbacks=[] if quiet else [Progress(run.name)])
        else:
            columns = None if plan.alone else {"algorithm": name, "seed": seed}
            result = keep(run, plan.place(folder, name, seed), resume=resume, columns=columns, quiet=quiet)
    except RunError as failure:
        history = failure.result.history if failure.result is not None else History()
        return Outcome(name, seed, history, with_notes(failure), failure.result)
    return Outcome(name, seed, result.history, None, result)


def gather(plan: Plan, folder: Path) -> None:
    """Put the histories of all runs so far, finished or not, into history.csv, in one step."""
    import pandas

    files = [plan.place(folder, name, seed) / folders.HISTORY for seed in plan.seeds for name in plan.algorithms]
    frames = [pandas.read_csv(file, dtype=str) for file in files if file.is_file() and file.stat().st_size]
    if frames:
        beside = folder / "history.new"
        pandas.concat(frames, ignore_index=True).to_csv(beside, index=False)
        os.replace(beside, folder / folders.HISTORY)


def table(outcomes: list[Outcome]):
    """All histories as one DataFrame, with the columns algorithm and seed first."""
    import pandas

    frames = [o.history.to_dataframe().assign(algorithm=o.algorithm, seed=o.seed) for o in outcomes if o.history]
    frame = pandas.concat(frames, ignore_index=True)
    first = ["algorithm", "seed"]
    return frame[first + [c for c in frame.columns if c not in first]]
