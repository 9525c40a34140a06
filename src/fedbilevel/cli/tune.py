"""The subcommand that finds x with no algorithm and no step size to choose."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..algorithm import Algorithm, Setting
from ..algorithms import ALGORITHMS
from ..app import load_app
from ..best import BETTER, Goal
from ..compare import Outcome, Plan
from ..component import title_of
from ..errors import InputError, RunError, check, unknown_name, with_notes
from ..given import JSON
from ..metrics import STOPPED, Metric, validation_loss
from ..race.heats import Candidate
from ..result import History
from ..results.folder import HISTORY, OUTCOME, clear
from ..results.kept import figures_of
from ..sampled import Sampled
from ..tune.entrants import MOST
from ..tune.kept import NAME, Racing, Tuning, chosen, keep_tuned, raced, rows
from ..tune.tuning import Tuned
from .apps import chosen as given_of
from .apps import need_nvflare, say_tables
from .execute import said, say_best, say_compiled, say_stopped
from .options import (
    Alpha,
    BatchSize,
    Clients,
    ClientState,
    Cohort,
    Command,
    Compile,
    DataDir,
    Dataset,
    Every,
    HowMany,
    Json,
    JudgedBy,
    Keep,
    MaxBytes,
    Model,
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

if TYPE_CHECKING:
    import pandas

_NETWORK = "nvflare"


@app.command(cls=Command)
def tune(
    context: typer.Context,
    task: TaskOrApp,
    rounds: Annotated[int, typer.Option("--rounds", help="Communication rounds in all, racing and judging in them.")],
    metric: JudgedBy = None, candidates: HowMany = None, batch_size: BatchSize = None, max_bytes: MaxBytes = None,
    algorithms: Annotated[
        str | None, typer.Option("--algorithms", help="Candidates of your own, names separated by commas.")
    ] = None,
    dataset: Dataset = None, data_dir: DataDir = None, partition: Partition = None, alpha: Alpha = None,
    model: Model = None, clients: Clients = None, cohort: Cohort = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Decides the partition, the start and the run.")] = None,
    out: Out = None, as_json: Json = False, resume: Resume = False, overwrite: Overwrite = False,
    engine: Annotated[str, typer.Option("--engine", help="simulation or loopback; of an app nvflare too.")] = "simulation",
    evaluate_every: Every = 1, precision: Precision = 32, no_check: NoCheck = False, no_cache: NoCache = False,
    compile: Compile = "auto", client_state: ClientState = "memory", keep: Keep = None,
    poc: Annotated[
        bool, typer.Option("--poc", help="With --engine nvflare: provisioned, mutual TLS, a process for each site.")
    ] = False,
):  # fmt: skip
    """Find x of a task or an application of yours: candidates race in the rounds of one run, the best goes on."""
    check(engine == _NETWORK or not poc, "--poc goes with --engine nvflare.")
    check(out is not None or engine == _NETWORK or not (resume or overwrite), "--resume and --overwrite go with --out.")
    wanted, names = _goal(metric), None if algorithms is None else chosen_names(algorithms)
    rehearsal = "simulation" if engine == _NETWORK and is_app(task) else engine  # by which its words are understood
    plan = plan_of(
        context, task, names, alone=is_app(task), dataset=dataset, data_dir=data_dir, partition=partition,
        alpha=alpha, model=model,
        clients=clients, cohort=cohort, rounds=rounds, seed=seed, engine=rehearsal, evaluate_every=evaluate_every,
        precision=precision, no_check=no_check, compile=compile, client_state=client_state, keep=keep,
    )  # fmt: skip
    if engine == _NETWORK:
        _check_counts(candidates, batch_size, max_bytes)
        for word, usual in (("compile", compile == "auto"), ("client-state", client_state == "memory")):
            check(usual, f"--{word} is for --engine simulation; the engine is {engine}.")
    plan = dataclasses.replace(plan, engine=engine)
    first = plan.first()
    given = None if names is None else _entrants(plan, batch_size)
    own = batch_size if given is None else None
    tuning = Tuning(
        plan, first, _judged_by(wanted, first.metrics), given, candidates=candidates, batch_size=own, max_bytes=max_bytes,
    )  # fmt: skip
    if engine == _NETWORK:
        look = False if no_check else None
        settings = {"rounds": rounds, "cohort": cohort, "seed": seed, "keep": keep, "check": look}
        _over_network(task, tuning, out, settings, poc=poc, resume=resume, overwrite=overwrite, as_json=as_json)
        return
    folder = None if out is None else tuning.open(out, resume, overwrite)
    _show(_ran(tuning, folder, resume), plan, folder, as_json)


def told_of(
    file: str, tune: bool, rounds: int | None, metric: str | None, candidates: int | None, batch_size: int | None,
    max_bytes: int | None,
) -> dict[str, JSON] | None:  # fmt: skip
    """How the job of an application tunes; None: it does not.

    Raises:
        InputError: a word means nothing, or goes with --tune alone.
    """
    given = {"metric": metric, "candidates": candidates, "batch_size": batch_size, "max_bytes": max_bytes}
    if not tune:
        for name, value in given.items():
            check(value is None, f"--{name.replace('_', '-')} goes with --tune.")
        return None
    check(rounds is not None, "--tune goes with --rounds R: communication rounds in all, racing and judging in them.")
    wanted, metrics = _goal(metric), load_app(file).metrics
    wanted = _judged_by(wanted, metrics)
    if wanted is not None and wanted.metric not in metrics:
        check(metrics, f"{file} has no metrics: leave --metric out, and the outer loss is judged.")
        raise unknown_name("metric", wanted.metric, metrics)
    _check_counts(candidates, batch_size, max_bytes)
    return {**given, "metric": None if wanted is None else str(wanted)}


def _check_counts(candidates: int | None, batch_size: int | None, max_bytes: int | None) -> None:
    """Refuse what no race can have, before anything is started."""
    for word, value, most in (
        ("candidates", candidates, MOST), ("batch-size", batch_size, None), ("max-bytes", max_bytes, None)
    ):  # fmt: skip
        good = value is None or (value >= 1 and (most is None or value <= most))
        check(good, f"--{word} is a whole number of at least 1{f' and at most {most}' if most else ''}; got {value}.")


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
        if folder is not None and not resume and not (folder / HISTORY).is_file():
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


def _over_network(
    file: str, tuning: Tuning, out: str | None, settings: Mapping[str, int | str | None], *, poc: bool, resume: bool,
    overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Tune an application over nvflare on this machine; results go to the folder `out`, by default named after the app."""
    from ..results import report

    need_nvflare()
    from ..engines.nvflare.launch import run

    source = tuning.plan.source
    assert isinstance(source, Sampled)  # an application's plan
    words = tuning.told(source.app.algorithm)
    folder = tuning.open(out or f"{source.name}-results", resume, overwrite)
    try:
        run(file, source.app, folder, len(source.sites), given_of(settings), poc=poc, resume=resume, tuning=words)
    except InputError:
        if not resume and not (folder / HISTORY).is_file():
            clear(folder)  # nothing ran
        raise
    finally:
        _figures(folder)
    outcome, frame, candidates = json.loads((folder / OUTCOME).read_text()), report.read(folder), raced(folder)
    if as_json:
        last = json.loads(frame.tail(1).to_json(orient="records"))[0]
        print(json.dumps({"chosen": outcome["chosen"], "last": last, "candidates": rows(candidates)}, indent=2))
    else:
        _print(candidates, frame, outcome["chosen"], type(source.app.algorithm))
        _say_files(folder)
        say_tables(folder)
    if "best" in outcome:
        say_best(str(tuning.plan.keep), outcome["best"], as_json)
    if STOPPED in outcome:
        say_stopped(outcome[STOPPED], as_json)


def _show(outcome: Outcome, plan: Plan, folder: Path | None, as_json: bool) -> None:
    """Who took part, who was left, and where it ended; exit with 1 if it failed."""
    from ..compare import table

    found = outcome.result
    if isinstance(found, Tuned):
        if as_json:
            print(json.dumps(_plain(found), indent=2))
        else:
            _print(found.candidates, table([outcome]), chosen(found), type(found.algorithm))
            say_compiled([dataclasses.replace(outcome, algorithm=title_of(found.algorithm))])
    if folder is not None and not as_json:
        _say_files(folder)
    if found is not None and found.kept is not None:
        say_best(str(plan.keep), figures_of(found.kept), as_json)
    said([outcome], as_json)


def _say_files(folder: Path) -> None:
    """What is there."""
    print(f"Written to {folder}: {', '.join(sorted(file.name for file in folder.iterdir() if file.is_file()))}")


def _plain(found: Tuned) -> dict[str, JSON]:
    """As plain values: what was chosen, the last row, the candidates."""
    known = lambda value: None if isinstance(value, float) and not math.isfinite(value) else value
    return {
        "chosen": chosen(found),
        "last": {name: known(value) for name, value in found.history[-1].items()},
        "candidates": rows(found.candidates),
    }


def _print(candidates: Sequence[Candidate], frame: pandas.DataFrame, won: Mapping[str, Any], own: type) -> None:
    """The table of candidates, the algorithm with its numbers, and where it ended.

    Args:
        frame: the history.
        won: what `chosen` says.
        own: the class of an algorithm that may be none of ours.
    """
    from rich.console import Console
    from rich.table import Table

    from ..results import report

    console = Console(width=None if sys.stdout.isatty() else 120)
    grid = Table("candidate", "algorithm", "tempo", "score", "dropped after round", "why", title="Candidates")
    whole = "chosen" if sum(each.round is None for each in candidates) == 1 else "still racing"
    for each in candidates:
        score = f"{each.score:.6g}" if math.isfinite(each.score) else "-"
        left, why = ("", each.why or whole) if each.round is None else (str(each.round), each.why)
        grid.add_row(each.name, each.algorithm, f"{each.tempo:g}", score, left, why)
    console.print(grid)
    report.show(report.summarise(frame), console)
    print(f"chosen: {_in_words(won, own)}")
    print(f"{won['rounds']} rounds, {won['bytes_down']:,} bytes down and {won['bytes_up']:,} up, over all clients")


def _in_words(won: Mapping[str, Any], own: type) -> str:
    """The algorithm with its numbers, and what else is not its default."""
    shown = lambda value: f"{value:.4g}" if isinstance(value, float) else repr(value)
    kinds = {kind.__name__: kind for kind in (*ALGORITHMS.values(), own)}
    usual = {field.name: field.default for field in dataclasses.fields(kinds[won["algorithm"]])}
    words = [f"{name}={shown(value)}" for name, value in won["settings"].items() if shown(value) != shown(usual[name])]
    return f"{won['algorithm']}({', '.join(words)})"
