"""A run or comparison that leaves a folder behind: configuration, history, summary, figures.

The folder holds config.json, history.csv (a row per evaluation), summary.csv and summary.md (a row per algorithm), and
plots. A comparison goes through its (algorithm, seed) pairs in order and keeps each finished one, so that an interrupted
one goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import jax

from .algorithm import Algorithm
from .callbacks import CSV, Callback, Checkpoint, Progress
from .cohorts import check_cohort
from .engines import ENGINES
from .engines.base import Engine
from .errors import Diverged, InputError, RunError, check, unknown_name
from .given import JSON
from .identity import differences
from .result import History, Result
from .settings import Setting, algorithm_class, best
from .solve import solve
from .tasks import TASKS, Options, Task


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        task, options: the task's name and how to build it (its seed is the first one).
        algorithms: name -> settings given by the user, beyond the checked-in best ones.
        seeds: the seeds to run each algorithm with.
        iterations, rounds: one of the two.
        cohort, engine, evaluate_every, precision: how to run.
        check: whether the problem is looked at first.
    """

    task: str
    options: Options
    algorithms: dict[str, dict[str, Setting]]
    seeds: tuple[int, ...]
    iterations: int | None = None
    rounds: int | None = None
    cohort: int | None = None
    engine: str = "simulation"
    evaluate_every: int = 1
    precision: int = 32
    check: bool = True

    def build_task(self, seed: int) -> Task:
        """The task for one seed."""
        if self.task not in TASKS:
            raise unknown_name("task", self.task, TASKS)
        return TASKS[self.task](dataclasses.replace(self.options, seed=seed))

    def build_algorithm(self, name: str, dataset: str) -> Algorithm:
        """An algorithm with its best settings, overridden by the user's."""
        kind = algorithm_class(name)
        return kind(**{**best(self.task, dataset, name), **self.algorithms[name]})

    def build_engine(self) -> Engine:
        """The engine."""
        if self.engine not in ENGINES:
            raise unknown_name("engine", self.engine, ENGINES)
        return ENGINES[self.engine](**{"cohort": self.cohort})

    def to_dict(self, clients: int) -> dict[str, JSON]:
        """For config.json: every setting that decides the numbers, the algorithms' fields in full.

        `clients` is how many the task has; with the cohort it says how many an exchange asks.
        """
        plain = dataclasses.asdict(self)
        del plain["check"]  # it decides no number
        dataset = self.options.dataset or TASKS[self.task].datasets[0]
        plain["options"] = {k: v for k, v in plain["options"].items() if k not in ("seed", "data_dir")} | {
            "dataset": dataset
        }
        plain["algorithms"] = {name: describe(self.build_algorithm(name, dataset)) for name in self.algorithms}
        plain["seeds"] = list(self.seeds)
        plain["clients_an_exchange"] = check_cohort(self.cohort, clients)
        return plain


def describe(algorithm: Algorithm) -> dict[str, JSON]:
    """An algorithm's fields as plain values."""
    fields = {f.name: getattr(algorithm, f.name) for f in dataclasses.fields(algorithm)}
    return {k: (v.value if v.mode == "fixed" else v.mode) if k == "truncation" else v for k, v in fields.items()}


def prepare(out: str | os.PathLike[str], plan: Plan, clients: int, resume: bool, overwrite: bool) -> Path:
    """The output folder, with its config.json; `clients` is how many the task has.

    Raises:
        InputError: the folder is in use and neither `resume` nor `overwrite` is set, or `resume` finds another run.
    """
    folder = Path(out)
    config = json.loads(json.dumps(plan.to_dict(clients)))
    file = folder / "config.json"
    check(not folder.exists() or folder.is_dir(), f"{folder} is a file: name a folder for the results.")
    if resume:
        check(file.is_file(), f"{folder} holds no run to resume: leave --resume out, or name the run's folder.")
        try:
            saved = json.loads(file.read_text())
        except ValueError:
            raise InputError(f"{file} cannot be read: start again without --resume, with --overwrite.") from None
        free = ("iterations", "rounds", "seeds", "clients_an_exchange")  # the last follows from the others
        kept = lambda plain: {k: v for k, v in _flat(plain).items() if k not in free}
        other = differences(kept(saved), kept(config))
        check(not other, f"{folder} holds another run: {other}. Use the same settings, or another folder.")
    elif folder.exists() and any(folder.iterdir()):
        check(overwrite, f"{folder} is not empty: name another folder, or add --resume to go on, or --overwrite.")
        check(file.is_file(), f"{folder} is not empty and holds no results of ours: name another folder.")
        clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config, indent=2) + "\n")
    return folder


def _flat(tree: Mapping[str, JSON], prefix: str = "") -> dict[str, JSON]:
    """Nested settings under dotted names."""
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def clear(folder: Path) -> None:
    """Remove what an earlier run left, and nothing else."""
    tables = ("history.csv", "summary.csv", "summary.md", "cost.csv", "cost.md")
    for pattern in ("config.json", *tables, "*.png", "runs/*/*", "runs/*", "runs"):
        for path in folder.glob(pattern):
            path.rmdir() if path.is_dir() else path.unlink()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one (algorithm, seed) went: its history, and the sentence it failed with, if it did."""

    algorithm: str
    seed: int
    history: History
    failure: str | None
    result: Result | None


def run_all(plan: Plan, folder: Path | None, resume: bool, quiet: bool = False) -> list[Outcome]:
    """Run every (algorithm, seed) of the plan; one that blows up is kept as far as it came, and the others still run."""
    outcomes = []
    with jax.enable_x64(plan.precision == 64):
        for seed in plan.seeds:
            task = plan.build_task(seed)
            for name in plan.algorithms:
                try:
                    outcomes.append(_one(plan, task, name, seed, folder, resume, quiet))
                finally:  # also after Ctrl-C: what there is so far can be looked at
                    if folder is not None:
                        gather(plan, folder)
    return outcomes


def _one(plan: Plan, task: Task, name: str, seed: int, folder: Path | None, resume: bool, quiet: bool) -> Outcome:
    callbacks: list[Callback] = [] if quiet else [Progress(f"{name}, seed {seed}")]
    place = None
    if folder is not None:
        place = folder / "runs" / f"{name}-{seed}"
        callbacks += [CSV(place / "history.csv", {"algorithm": name, "seed": seed}), Checkpoint(place)]
    going_on = place if place is not None and resume and (place / "checkpoint.eqx").exists() else None
    try:
        result = solve(
            task.problem, task.data, plan.build_algorithm(name, task.dataset), task.x, task.y, plan.iterations,
            rounds=plan.rounds, key=task.key, engine=plan.build_engine(), callbacks=callbacks, metrics=task.metrics,
            evaluate_every=plan.evaluate_every, resume=going_on, check=plan.check,
        )  # fmt: skip
    except Diverged as failure:
        history = failure.result.history if failure.result is not None else History()
        return Outcome(name, seed, history, str(failure), failure.result)
    except RunError as failure:
        return Outcome(name, seed, History(), str(failure), None)
    return Outcome(name, seed, result.history, None, result)


def gather(plan: Plan, folder: Path) -> None:
    """Put the histories of all runs so far, finished or not, into history.csv, in one step."""
    import pandas

    files = [folder / "runs" / f"{name}-{seed}" / "history.csv" for seed in plan.seeds for name in plan.algorithms]
    frames = [pandas.read_csv(file, dtype=str) for file in files if file.is_file() and file.stat().st_size]
    if frames:
        beside = folder / "history.new"
        pandas.concat(frames, ignore_index=True).to_csv(beside, index=False)
        os.replace(beside, folder / "history.csv")


def table(outcomes: list[Outcome]):
    """All histories as one DataFrame, with the columns algorithm and seed first."""
    import pandas

    frames = [o.history.to_dataframe().assign(algorithm=o.algorithm, seed=o.seed) for o in outcomes if o.history]
    frame = pandas.concat(frames, ignore_index=True)
    first = ["algorithm", "seed"]
    return frame[first + [c for c in frame.columns if c not in first]]
