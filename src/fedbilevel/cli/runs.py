"""Subcommands that run, compare and inspect algorithms."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated, Unpack

import typer

from ..compare import Plan
from ..engines import ENGINES
from ..tasks import TASKS, Options
from ..tasks.base import Settings
from .options import (
    Alpha,
    Clients,
    Cohort,
    Command,
    DataDir,
    Dataset,
    Engine,
    Every,
    Iterations,
    Json,
    NoCheck,
    Out,
    Overwrite,
    Partition,
    Precision,
    Resume,
    Rounds,
    Sets,
    Task,
    TaskOrApp,
    app,
)

DEFAULT_ROUNDS = 300


@app.command(cls=Command)
def run(
    context: typer.Context,
    task: TaskOrApp,
    algorithm: Annotated[str, typer.Option("--algorithm", help="aggitd, fednest, ... (see `list`).")] = "aggitd",
    dataset: Dataset = None, data_dir: DataDir = None, partition: Partition = "iid", alpha: Alpha = None,
    clients: Clients = None, cohort: Cohort = None, iterations: Iterations = None, rounds: Rounds = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Decides the partition, the start and the run.")] = None,
    sets: Sets = None, out: Out = None, as_json: Json = False, resume: Resume = False, overwrite: Overwrite = False,
    engine: Engine = "simulation", evaluate_every: Every = 1, precision: Precision = 32,
    no_check: NoCheck = False,
    poc: Annotated[
        bool, typer.Option("--poc", help="With --engine nvflare: provisioned, mutual TLS, a process for each site.")
    ] = False,
):  # fmt: skip
    """Run one algorithm on a task, or an application of yours; a task takes the checked-in best settings without --set."""
    if task.endswith(".py"):
        from .apps import run_app

        _only_for_apps(context)
        settings = {"iterations": iterations, "rounds": rounds, "cohort": cohort, "seed": seed}
        settings["check"] = False if no_check else None
        run_app(task, engine=engine, poc=poc, clients=clients, out=out, resume=resume, overwrite=overwrite,
                as_json=as_json, settings=settings)  # fmt: skip
        return
    plan = _plan(task, [algorithm], (seed or 0,), sets, iterations, rounds, cohort, engine, evaluate_every, precision,
                 dataset=dataset, data_dir=data_dir, partition=partition, alpha=alpha, clients=clients)  # fmt: skip
    _execute(dataclasses.replace(plan, check=not no_check), out, resume, overwrite, as_json)


@app.command()
def deploy(
    file: Annotated[str, typer.Argument(help="The Python file of an application.")],
    out: Annotated[str, typer.Option("--out", help="Folder for the job.")],
    clients: Annotated[int, typer.Option("--clients", help="How many sites have to be connected to start.")] = 1,
    iterations: Iterations = None, rounds: Rounds = None, cohort: Cohort = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Decides cohorts and minibatches.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from where the server and the sites stand.")] = False,
):  # fmt: skip
    """Write an NVIDIA FLARE job of an application, for an operator to submit with nvflare's own tools."""
    from .apps import deploy_app

    settings = {"iterations": iterations, "rounds": rounds, "cohort": cohort, "seed": seed}
    deploy_app(file, out, clients, resume, settings)


def _only_for_apps(context: typer.Context) -> None:
    """Refuse options that an application's file decides."""
    from ..errors import check

    for name in ("algorithm", "dataset", "data_dir", "partition", "alpha", "sets", "evaluate_every", "precision"):
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        option = "set" if name == "sets" else name.replace("_", "-")
        check(not given, f"--{option} is for tasks: an application's file says it itself.")


@app.command()
def compare(
    task: Task,
    algorithms: Annotated[str, typer.Option("--algorithms", help="Names, separated by commas.")] = "aggitd,fednest",
    seeds: Annotated[int, typer.Option("--seeds", help="How many seeds, from --seed on.")] = 3,
    dataset: Dataset = None, data_dir: DataDir = None, partition: Partition = "iid", alpha: Alpha = None,
    clients: Clients = None, cohort: Cohort = None, iterations: Iterations = None, rounds: Rounds = None,
    seed: Annotated[int, typer.Option("--seed", help="The first seed.")] = 0,
    sets: Sets = None, out: Out = None, as_json: Json = False, resume: Resume = False, overwrite: Overwrite = False,
    engine: Engine = "simulation", evaluate_every: Every = 1, precision: Precision = 32,
    no_check: NoCheck = False,
):  # fmt: skip
    """Run several algorithms on the same task, data, cohorts and seeds."""
    from ..errors import check

    names = [name.strip() for name in algorithms.split(",") if name.strip()]
    check(names, "--algorithms takes names separated by commas, as in aggitd,fednest.")
    check(len(set(names)) == len(names), f"--algorithms names one twice: {algorithms}.")
    check(seeds >= 1, f"--seeds is how many seeds to run, at least 1; got {seeds}.")
    several = tuple(range(seed, seed + seeds))
    plan = _plan(task, names, several, sets, iterations, rounds, cohort, engine, evaluate_every, precision,
                 dataset=dataset, data_dir=data_dir, partition=partition, alpha=alpha, clients=clients)  # fmt: skip
    _execute(dataclasses.replace(plan, check=not no_check), out, resume, overwrite, as_json)


@app.command()
def protocol(
    task: Task,
    algorithm: Annotated[str, typer.Option("--algorithm", help="aggitd, fednest, ... (see `list`).")] = "aggitd",
    dataset: Dataset = None, data_dir: DataDir = None, partition: Partition = "iid", alpha: Alpha = None,
    clients: Clients = None, cohort: Cohort = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides the partition and the start.")] = 0,
    sets: Sets = None, as_json: Json = False, precision: Precision = 32,
):  # fmt: skip
    """Print what one iteration exchanges: rounds and bytes, from the algorithm's own program."""
    import jax

    from ..protocol import protocol as derive

    plan = _plan(task, [algorithm], (seed,), sets, 1, None, cohort, "simulation", 1, precision,
                 dataset=dataset, data_dir=data_dir, partition=partition, alpha=alpha, clients=clients)  # fmt: skip
    with jax.enable_x64(precision == 64):
        built = plan.build_task(seed)
        alg = plan.build_algorithm(algorithm, built.dataset)
        table = derive(alg, built.problem, built.data, built.x, built.y, plan.build_engine())
    print(table.to_json() if as_json else table)


@app.command()
def check(algorithm: Annotated[str | None, typer.Argument(help="An algorithm; default all.")] = None):
    """Put the algorithms through the conformance suite."""
    from ..algorithms import ALGORITHMS, BIASED, checked
    from ..settings import algorithm_class
    from ..testing import CheckFailed, check_algorithm

    failed = 0
    for name in [algorithm] if algorithm else list(ALGORITHMS):
        algorithm_class(name)
        busy, exact = checked(name)
        try:
            report = check_algorithm(busy, exact)
        except CheckFailed as failure:
            report, failed = failure.report, failed + 1
        print(report)
        if name in BIASED:
            print("         (its hypergradient is local by design, and biased where clients differ: not compared)")
        elif exact is None:
            print("         (it has no estimator of the hypergradient that can be exact: not compared)")
    if failed:
        raise typer.Exit(1)


@app.command("list")
def list_names(as_json: Json = False):
    """List the tasks, algorithms, partitions and engines."""
    from rich.console import Console
    from rich.table import Table

    from ..algorithms import ALGORITHMS
    from ..algorithms.about import about as line_about
    from ..partition import PARTITIONS

    lines = {name: line_about(name) for name in ALGORITHMS}
    about = {name: line.summary for name, line in lines.items()}
    if as_json:
        tasks = {k.name: {"summary": k.summary, "datasets": k.datasets} for k in TASKS.values()}
        print(
            json.dumps(
                {
                    "tasks": tasks,
                    "algorithms": about,
                    "about": {name: dataclasses.asdict(line) for name, line in lines.items()},
                    "partitions": list(PARTITIONS),
                    "engines": list(ENGINES),
                },
                indent=2,
            )
        )
        return
    print("Tasks (data sets, the default first)")
    for kind in TASKS.values():
        print(f"  {kind.name:22}{kind.summary} ({', '.join(kind.datasets)})")
    table = Table(
        "Algorithm", "rounds", "derivatives", "client state", "asks", "when to use it", box=None, pad_edge=False
    )
    for name, line in lines.items():
        table.add_row(name, line.rounds, line.order, "yes" if line.state else "no", line.asks, line.when)
    print("Algorithms (rounds of one iteration, T and N its turns and terms)")
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    print(f"Partitions\n  {', '.join(PARTITIONS)}\nEngines\n  {', '.join(ENGINES)}; for an application nvflare too")


def _plan(
    task: str, algorithms: list[str], seeds: tuple[int, ...], sets: list[str] | None, iterations: int | None,
    rounds: int | None, cohort: int | None, engine: str, evaluate_every: int, precision: int,
    **options: Unpack[Settings],
) -> Plan:  # fmt: skip
    """What the words of a command mean."""
    from ..errors import check, unknown_name
    from ..settings import parse

    check(precision in (32, 64), f"--precision is 32 or 64; got {precision}.")
    check(iterations is None or rounds is None, "give --iterations or --rounds, not both.")
    check(engine != "nvflare", "--engine nvflare is for an application: name its Python file (docs: Deploy).")
    for name, known in ((task, TASKS), (engine, ENGINES)):
        if name not in known:
            raise unknown_name("task" if known is TASKS else "engine", name, known)
    if iterations is None and rounds is None:
        rounds = DEFAULT_ROUNDS
    settings = parse(sets or [], algorithms)
    return Plan(
        task, Options(**options), settings, seeds, iterations, rounds, cohort, engine, evaluate_every, precision
    )


def _execute(plan: Plan, out: str | None, resume: bool, overwrite: bool, as_json: bool) -> None:
    """Run a plan, write its folder, print its table; exit with 1 if a run failed."""
    from rich.console import Console

    from ..compare import clear, prepare, run_all, table
    from ..errors import InputError, check
    from ..results import report

    check(out is not None or not (resume or overwrite), "--resume and --overwrite go with --out.")
    first = plan.build_task(plan.seeds[0])  # refuses a bad task, data set or partition before anything is written
    for name in plan.algorithms:
        plan.build_algorithm(name, first.dataset)
    folder = None if out is None else prepare(out, plan, first.data.clients, resume, overwrite)
    try:
        outcomes = run_all(plan, folder, resume)
    except InputError:
        if folder is not None and not resume:
            clear(folder)  # nothing ran: leave nothing that the corrected command would stumble over
        raise
    frame = table(outcomes)
    summary = report.summarise(frame)
    if folder is not None:
        files = report.write(folder, frame)
    if as_json:
        print(report.to_json(summary))
    else:
        report.show(summary, Console())
        if folder is not None:
            print(f"Written to {folder}: config.json, history.csv, {', '.join(file.name for file in files)}")
    failures = [o for o in outcomes if o.failure]
    for outcome in failures:
        print(f"failed: {outcome.algorithm}, seed {outcome.seed}: {outcome.failure}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)
