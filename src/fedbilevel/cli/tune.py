"""The subcommand that finds x with no algorithm and no step size to choose."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from ..algorithm import Algorithm, Setting
from ..best import BETTER, Goal
from ..compare import Outcome, Plan
from ..component import title_of
from ..errors import InputError, RunError, check, unknown_name, with_notes
from ..given import JSON
from ..metrics import Metric, validation_loss
from ..result import History
from ..results.folder import clear
from ..results.kept import figures_of
from ..tune.kept import NAME, Racing, Tuning, chosen, keep_tuned, rows
from ..tune.tuning import Tuned
from .execute import said, say_best, say_compiled
from .options import (
    Alpha,
    Clients,
    ClientState,
    Cohort,
    Command,
    Compile,
    DataDir,
    Dataset,
    Every,
    Json,
    Keep,
    NoCache,
    NoCheck,
    Out,
    Overwrite,
    Partition,
    Precision,
    Resume,
    TaskOrApp,
    app,
)
from .plans import chosen_names, is_app, plan_of

_NETWORK = "nvflare"


@app.command(cls=Command)
def tune(
    context: typer.Context,
    task: TaskOrApp,
    rounds: Annotated[int, typer.Option("--rounds", help="Communication rounds in all, racing and judging in them.")],
    metric: Annotated[
        str | None,
        typer.Option("--metric", help="METRIC:min or METRIC:max, which candidates are judged by; else the outer loss."),
    ] = None,
    candidates: Annotated[
        int | None, typer.Option("--candidates", help="How many race, the first of all; fewer where rounds are few.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Rows of a minibatch, fresh for every step; default all rows.")
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option("--max-bytes", help="Payload, down and up, that is not exceeded.")
    ] = None,
    algorithms: Annotated[
        str | None, typer.Option("--algorithms", help="Candidates of your own, names separated by commas.")
    ] = None,
    dataset: Dataset = None, data_dir: DataDir = None, partition: Partition = "iid", alpha: Alpha = None,
    clients: Clients = None, cohort: Cohort = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Decides the partition, the start and the run.")] = None,
    out: Out = None, as_json: Json = False, resume: Resume = False, overwrite: Overwrite = False,
    engine: Annotated[str, typer.Option("--engine", help="simulation or loopback.")] = "simulation",
    evaluate_every: Every = 1, precision: Precision = 32, no_check: NoCheck = False, no_cache: NoCache = False,
    compile: Compile = "auto", client_state: ClientState = "memory", keep: Keep = None,
):  # fmt: skip
    """Find x of a task or an application of yours: candidates race in the rounds of one run, the best goes on."""
    check(
        engine != _NETWORK,
        "candidates race in simulation and Loopback for now: leave --engine nvflare out, or `fedbilevel run` the winner.",
    )
    check(out is not None or not (resume or overwrite), "--resume and --overwrite go with --out.")
    wanted, names = _goal(metric), None if algorithms is None else chosen_names(algorithms)
    plan = plan_of(
        context, task, names, alone=is_app(task), dataset=dataset, data_dir=data_dir, partition=partition, alpha=alpha,
        clients=clients, cohort=cohort, rounds=rounds, seed=seed, engine=engine, evaluate_every=evaluate_every,
        precision=precision, no_check=no_check, compile=compile, client_state=client_state, keep=keep,
    )  # fmt: skip
    first = plan.first()
    given = None if names is None else _entrants(plan, batch_size)
    own = batch_size if given is None else None
    tuning = Tuning(
        plan,
        first,
        _judged_by(wanted, first.metrics),
        given,
        candidates=candidates,
        batch_size=own,
        max_bytes=max_bytes,
    )
    folder = None if out is None else tuning.open(out, resume, overwrite)
    _show(_ran(tuning, folder, resume), plan, folder, as_json)


def _goal(metric: str | None) -> Goal | None:
    """What `--metric` says."""
    if metric is None:
        return None
    name, _, direction = metric.rpartition(":")
    check(
        name and direction,
        f"--metric names a metric and its direction, as in test_loss:min or test_accuracy:max; got {metric!r}.",
    )
    if direction not in BETTER:
        raise unknown_name("direction", direction, BETTER)
    return Goal(name, direction)


def _judged_by(wanted: Goal | None, metrics: Mapping[str, Metric]) -> Goal | None:
    """The same; None for the outer loss over all clients, which is judged where nothing is named."""
    if wanted is None or metrics.get(wanted.metric, validation_loss) is not validation_loss:
        return wanted
    if wanted.metric not in {*metrics, validation_loss.__name__}:
        return wanted  # unknown, which is refused with the others' names
    check(wanted.direction == "min", f"{wanted.metric} is the outer loss, which is minimised: {wanted.metric}:min.")
    return None


def _entrants(plan: Plan, batch_size: int | None) -> dict[str, Algorithm]:
    """The candidates that are named, as `run` has them, but their steps found while they run."""
    from ..settings import STEPS

    found = {}
    for name in plan.algorithms:
        fields = dataclasses.fields(plan.choose(name).algorithm)
        auto: dict[str, Setting] = {f.name: "auto" for f in fields if f.name in STEPS and f.default == "auto"}
        algorithm = plan.source.choose(name, auto).algorithm
        if batch_size is not None:
            has = any(field.name == "batch_size" for field in dataclasses.fields(algorithm))
            check(has, f"{name} has no batch_size: leave --batch-size out.")
            algorithm = dataclasses.replace(algorithm, batch_size=batch_size)
        found[name] = algorithm
    return found


def _ran(tuning: Tuning, folder: Path | None, resume: bool) -> Outcome:
    """Tune; where it fails or is interrupted, tables and figures of what there is are made all the same."""
    seed = tuning.plan.seeds[0]
    try:
        alone = lambda: tuning.run(callbacks=[Racing(tuning.name)])
        found = alone() if folder is None else keep_tuned(tuning, folder, resume=resume)
    except InputError:
        if folder is not None and not resume:
            clear(folder)  # nothing ran: leave nothing that the corrected command would stumble over
        raise
    except RunError as failure:
        history = History() if failure.result is None else failure.result.history
        outcome = Outcome(NAME, seed, history, with_notes(failure), failure.result)
    except KeyboardInterrupt:
        _figures(folder)
        raise
    else:
        outcome = Outcome(NAME, seed, found.history, None, found)
    _figures(folder)
    return outcome


def _figures(folder: Path | None) -> None:
    """Tables and figures of its history, if it got as far as that."""
    from ..results import report

    if folder is None:
        return
    try:
        frame = report.read(folder)
    except InputError:  # interrupted before the first row
        return
    report.write(folder, frame)


def _show(outcome: Outcome, plan: Plan, folder: Path | None, as_json: bool) -> None:
    """Who took part, who was left, and where it ended; exit with 1 if it failed."""
    found = outcome.result
    if isinstance(found, Tuned):
        if as_json:
            print(json.dumps(_plain(found), indent=2))
        else:
            _print(found, outcome)
            say_compiled([dataclasses.replace(outcome, algorithm=title_of(found.algorithm))])
    if folder is not None and not as_json:
        files = sorted(file.name for file in folder.iterdir() if file.is_file())
        print(f"Written to {folder}: {', '.join(files)}")
    if found is not None and found.kept is not None:
        say_best(str(plan.keep), figures_of(found.kept), as_json)
    said([outcome], as_json)


def _plain(found: Tuned) -> dict[str, JSON]:
    """As plain values: what was chosen, the last row, the candidates."""
    known = lambda value: None if isinstance(value, float) and not math.isfinite(value) else value
    return {
        "chosen": chosen(found),
        "last": {name: known(value) for name, value in found.history[-1].items()},
        "candidates": rows(found.candidates),
    }


def _print(found: Tuned, outcome: Outcome) -> None:
    """The table of candidates, the algorithm with its numbers, and where it ended."""
    from rich.console import Console
    from rich.table import Table

    from ..compare import table
    from ..results import report

    console = Console(width=None if sys.stdout.isatty() else 120)
    grid = Table("candidate", "algorithm", "tempo", "score", "dropped after round", "why", title="Candidates")
    whole = "chosen" if sum(each.round is None for each in found.candidates) == 1 else "still racing"
    for each in found.candidates:
        score = f"{each.score:.6g}" if math.isfinite(each.score) else "-"
        left, why = ("", each.why or whole) if each.round is None else (str(each.round), each.why)
        grid.add_row(each.name, each.algorithm, f"{each.tempo:g}", score, left, why)
    console.print(grid)
    report.show(report.summarise(table([outcome])), console)
    print(f"chosen: {_in_words(found)}")
    print(f"{found.rounds} rounds, {found.bytes_down:,} bytes down and {found.bytes_up:,} up, over all clients")


def _in_words(found: Tuned) -> str:
    """The algorithm with its numbers, and what else is not its default."""
    shown = lambda value: f"{value:.4g}" if isinstance(value, float) else repr(value)
    usual = {field.name: field.default for field in dataclasses.fields(found.algorithm)}
    plain = {name: getattr(found.algorithm, name) for name in usual}
    words = [f"{name}={shown(value)}" for name, value in plain.items() if shown(value) != shown(usual[name])]
    return f"{title_of(found.algorithm)}({', '.join(words)})"
