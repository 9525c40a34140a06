"""A study: contenders on one task, each at its best step sizes from one equal grid, then over several seeds.

A study is data. `run` takes it through three stages, and goes on where it was interrupted:

1. the grid, on seeds of its own (grid.csv), and each contender's best point of it (settings.toml);
2. the seeds (runs/LABEL-SEED, history.csv), the share of the implicit part of the hypergradient beside them (shares.csv);
3. tables and figures (`tables.py`, `figures.py`).

A point of the grid is judged by the first round at which the median of five consecutive evaluations is at the goal; one
that never gets there, or is not there at the end, by how far it is from it at the end. A contender is judged by the mean
over the grid's seeds.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import numpy as np
import optax.tree

from ..algorithm import State
from ..callbacks import CSV, Callback, Checkpoint, Progress
from ..engines import Simulation
from ..engines.base import Carry
from ..errors import Diverged, check
from ..settings import algorithm_class
from ..solve import estimate, solve
from ..tasks import TASKS, Options, Task
from .oracles import oracle_calls
from .report import direction, first_reached, running_median
from .sweep import points, sweep

Telling = Callable[[str], None]
_STILL = 1e-30  # the outer step of a reference line that leaves x where it is


@dataclasses.dataclass(frozen=True)
class Contender:
    """An algorithm in a study.

    Attributes:
        label: its name in tables and figures.
        algorithm: its name on the command line.
        settings: counts and options (and step sizes that its grid leaves alone).
        variants: counts and options that the grid chooses among, as it does among step sizes.
        kind: "rival"; or a reference line: "frozen", x stays as it is; "pooled", one client holds all data.
    """

    label: str
    algorithm: str
    settings: Mapping[str, Any]
    kind: Literal["rival", "frozen", "pooled"] = "rival"
    variants: tuple[Mapping[str, Any], ...] = ({},)

    def build(self, chosen: Mapping[str, Any]) -> Any:
        """The algorithm with these step sizes, and the variant's settings."""
        still = {"outer_lr": _STILL} if self.kind == "frozen" else {}
        return algorithm_class(self.algorithm)(**{**self.settings, **chosen, **still})


@dataclasses.dataclass(frozen=True)
class Study:
    """What to compare, on what, and how long.

    Attributes:
        name, summary: what it is called, and a line about it.
        task, options, cohort: the task by name and how to build it (seeds apart); clients an exchange.
        contenders: who takes part.
        grid: step sizes to try, equal for all.
        grid_rounds, grid_seeds: the budget of a grid run, and the seeds it is judged on.
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

    def build(self, contender: Contender, seed: int, data_dir: Any) -> tuple[Task, Simulation]:
        """A contender's task for one seed, and its engine."""
        options = dataclasses.replace(self.options, seed=seed, data_dir=data_dir)
        if contender.kind == "pooled":
            return TASKS[self.task](dataclasses.replace(options, clients=1, partition="iid", alpha=None)), Simulation()
        return TASKS[self.task](options), Simulation(cohort=self.cohort)

    @property
    def clients_an_exchange(self) -> int:
        """How many clients a rival asks."""
        return self.cohort or self.options.clients or 1

    def rates(self, contender: Contender) -> dict[str, tuple[float, ...]]:
        """The contender's grid: the study's, but for what it leaves alone."""
        idle = {"outer_lr", "hessian_lr"} if contender.kind == "frozen" else set()
        return {name: values for name, values in self.grid.items() if name not in idle | set(contender.settings)}

    def candidates(self, contender: Contender) -> list[dict[str, Any]]:
        """Everything that the grid tries: each variant at each point of step sizes."""
        return [{**variant, **point} for variant in contender.variants for point in points(self.rates(contender))]

    def to_dict(self) -> dict[str, Any]:
        """Everything that decides the numbers, as plain values."""
        plain = dataclasses.asdict(self)
        plain["options"] = {k: v for k, v in plain["options"].items() if k not in ("seed", "data_dir")}
        return json.loads(json.dumps(plain))


def run(study: Study, folder: Path, data_dir: Any = None, best: Mapping[str, Any] | None = None) -> None:
    """Stages 1 and 2.

    Args:
        folder: of the study; what is there already is kept, if it is of the same study.
        data_dir: folder of data sets that are not embedded.
        best: label -> what the grid chose, to leave it out.

    Raises:
        InputError: the folder holds another study, or a data set is missing.
    """
    study.build(study.contenders[0], study.seeds[0], data_dir)  # a missing data set leaves no folder behind
    open_folder(folder, study.to_dict())
    asked = {"study": study.name, "clients_an_exchange": study.clients_an_exchange}  # what `fedbilevel cost` needs
    (folder / "config.json").write_text(json.dumps(asked) + "\n")
    say = lambda news: print(f"{study.name}: {news}", flush=True)
    if best is None:
        best = search(study, folder, data_dir, say)
    else:
        check(set(best) >= {c.label for c in study.contenders}, f"no settings are checked in for all of {study.name}.")
    write_settings(folder / "settings.toml", best)
    for seed in study.seeds:
        for contender in study.contenders:
            _final(study, contender, contender.build(best[contender.label]), seed, folder, data_dir, say)


def open_folder(folder: Path, plain: dict[str, Any]) -> None:
    """Make the folder, or go on in one of the very same study."""
    file = folder / "study.json"
    if folder.exists() and any(folder.iterdir()):
        check(file.is_file(), f"{folder} is not empty and holds no study: name another folder.")
        same = json.loads(file.read_text()) == plain
        check(same, f"{folder} holds another study, or another version of it: name another folder, or remove this one.")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(plain, indent=2) + "\n")


# Stage 1 ----------------------------------------------------------------------------------------------------------------


def search(study: Study, folder: Path, data_dir: Any, say: Telling) -> dict[str, dict[str, Any]]:
    """Each contender's best step sizes and variant; every finished (contender, seed) is kept in grid.csv."""
    import pandas

    file = folder / "grid.csv"
    rows: list[dict[str, Any]] = pandas.read_csv(file).to_dict("records") if file.is_file() else []
    finished = {(row["label"], int(row["seed"])) for row in rows}
    for contender in study.contenders:
        for seed in study.grid_seeds:
            if (contender.label, seed) not in finished:
                rows += _search_one(study, contender, seed, data_dir, say)
                pandas.DataFrame(rows).to_csv(file, index=False)
    best = {}
    for contender in study.contenders:
        mine = [row for row in rows if row["label"] == contender.label]
        of = lambda point, mine=mine: [row["score"] for row in mine if all(row[n] == v for n, v in point.items())]
        best[contender.label] = min(study.candidates(contender), key=lambda point, of=of: float(np.mean(of(point))))
        say(f"{contender.label}: best {best[contender.label]}")
    return best


def _search_one(study: Study, contender: Contender, seed: int, data_dir: Any, say: Telling) -> list[dict[str, Any]]:
    task, engine = study.build(contender, seed, data_dir)
    rows = []
    for variant in contender.variants:
        curves = sweep(
            task.problem, task.data, contender.build(variant), points(study.rates(contender)), task.x, task.y,
            rounds=study.grid_rounds, key=task.key, engine=engine, metrics={study.metric: task.metrics[study.metric]},
            evaluate_every=study.every,
        )  # fmt: skip
        for curve in curves:
            values = curve.metrics[study.metric]
            reached, score = judge(study, curve.rounds, values)
            rows.append({
                "label": contender.label, "seed": seed, **variant, **curve.settings,
                "rounds_to_goal": reached, "end": float(running_median(values)[-1]), "score": score,
            })  # fmt: skip
    say(f"{contender.label}, grid of {len(rows)} on seed {seed}: best score {min(row['score'] for row in rows):.0f}")
    return rows


def judge(study: Study, rounds: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """(the round at which the goal is reached, infinite for never; the score of the run, lower is better).

    A run that is at the goal early and falls back is no good: its score is that of one that never got there.
    """
    sign = direction(study.metric)
    at = first_reached(sign * values, sign * study.goal)
    reached = float("inf") if at is None else float(rounds[at])
    short = sign * (study.goal - running_median(values)[-1])
    if short <= 0:
        return reached, reached
    missed = short / max(abs(study.goal), 1e-12) if np.isfinite(short) else 10.0
    return reached, study.grid_rounds * (1 + float(missed))


def write_settings(file: Path, best: Mapping[str, Mapping[str, Any]]) -> None:
    """What the grid chose, as TOML, a section a contender."""
    text = "".join(  # numbers, words and truth values are written alike in JSON and TOML
        f"[{json.dumps(label)}]\n" + "".join(f"{name} = {json.dumps(v)}\n" for name, v in chosen.items()) + "\n"
        for label, chosen in best.items()
    )
    file.write_text(text)


# Stage 2 ----------------------------------------------------------------------------------------------------------------


def _final(study: Study, contender: Contender, algorithm: Any, seed: int, folder: Path, data_dir: Any, say) -> None:
    place = folder / "runs" / f"{contender.label}-{seed}"
    if (place / "done.json").is_file():
        return
    task, engine = study.build(contender, seed, data_dir)
    share = study.shares and contender.kind == "rival" and seed == study.seeds[0]
    callbacks: list[Callback] = [
        Progress(f"{study.name}: {contender.label}, seed {seed}"),
        CSV(place / "history.csv", {"algorithm": contender.label, "seed": seed}),
        Checkpoint(place),
        *([Shares(place / "shares.csv", task, engine, contender.label, seed, study.shares)] if share else []),
    ]
    failure = None
    try:
        result = solve(
            task.problem, task.data, algorithm, task.x, task.y, rounds=study.rounds, key=task.key, engine=engine,
            callbacks=callbacks, metrics=task.metrics, evaluate_every=study.every,
            resume=place if (place / "checkpoint.eqx").exists() else None,
        )  # fmt: skip
    except Diverged as error:
        failure, result = str(error), error.result
    per_iteration = None if result is None else result.protocol.rounds
    end = {} if result is None else {k: v for k, v in result.history[-1].items() if k == study.metric}
    say(f"{contender.label}, seed {seed}: {failure or ', '.join(f'{k} {v:.4f}' for k, v in end.items())}")
    done = {
        "oracle_calls": _calls(folder, contender.label, algorithm),
        "rounds_per_iteration": per_iteration,
        "failure": failure,
        "kind": contender.kind,
    }
    (place / "done.json").write_text(json.dumps(done) + "\n")
    (place / "checkpoint.eqx").unlink(missing_ok=True)


def _calls(folder: Path, label: str, algorithm: Any) -> float:
    """Oracle calls of one iteration; counted once for each contender."""
    file = folder / "oracles.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    if label not in known:
        known[label] = oracle_calls(algorithm)
        file.write_text(json.dumps(known, indent=2) + "\n")
    return known[label]["all"]


class Shares(Callback):
    """Now and then, what share of the hypergradient estimate is its implicit part.

    At the run's x and y the algorithm's own estimator is run twice with the same key: as it is, h = direct + implicit,
    and on the problem whose outer loss does not see x, which leaves the implicit part alone. The share is
    |implicit| / (|direct| + |implicit|).
    """

    def __init__(self, file: Path, task: Task, engine: Any, label: str, seed: int, every: int):
        self.file, self.task, self.engine, self.every = file, task, engine, every
        self.named = {"algorithm": label, "seed": seed}
        self._runs: list[Any] | None = None
        self._next = 0

    def start(self, run) -> None:
        self._next = run.iteration
        if not self.file.exists():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text("algorithm,seed,iteration,rounds,implicit,direct,share\n")

    def advance(self, run) -> None:
        if run.iteration < self._next:
            return
        self._next = run.iteration + self.every
        implicit, direct = self._parts(run)
        share = implicit / (implicit + direct) if implicit + direct > 0 else float("nan")
        cells = [*self.named.values(), run.iteration, run.rounds, implicit, direct, share]
        with self.file.open("a", newline="") as file:
            csv.writer(file).writerow(cells)

    def _parts(self, run) -> tuple[float, float]:
        if self._runs is None:
            problem = self.task.problem
            blind = dataclasses.replace(problem, outer=_Blind(problem.outer))
            state = State(run.carry.state.x, run.carry.state.y)
            self._runs = [
                self.engine.bind(each, self.task.data, run.algorithm, state, self.task.key, estimate)
                for each in (problem, blind)
            ]
        start = run.carry.state
        found = []
        for execution in self._runs:
            at = Carry(State(start.x, start.y), execution.start(run.algorithm, State(start.x, start.y)).client_state, 0)
            carry, _ = execution.advance(run.algorithm, at, 1, float("inf"))
            found.append(carry.state.x)
        whole, implicit = found
        return float(optax.tree.norm(implicit)), float(optax.tree.norm(optax.tree.sub(whole, implicit)))


class _Blind(eqx.Module):
    """An outer loss that takes x for a constant."""

    loss: Callable[..., Any]

    def __call__(self, x, *rest):
        return self.loss(jax.lax.stop_gradient(x), *rest)
