"""Subcommands that run, compare and inspect algorithms."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated

import typer

from ..engines import ENGINES
from ..tasks import TASKS
from .execute import execute
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
    Engine,
    Every,
    HowMany,
    Iterations,
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
    Rounds,
    Sets,
    TaskOrApp,
    app,
)
from .plans import chosen_names, is_app, plan_of


@app.command(cls=Command)
def run(
    context: typer.Context,
    task: TaskOrApp,
    algorithm: Annotated[
        str | None, typer.Option("--algorithm", help="aggitd, fednest, ... (see `list`); default the task's, mostly aggitd.")
    ] = None,
    dataset: Dataset = None, data_dir: DataDir = None, partition: Partition = None, alpha: Alpha = None,
    clients: Clients = None, cohort: Cohort = None, iterations: Iterations = None, rounds: Rounds = None,
    model: Model = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Decides the partition, the start and the run.")] = None,
    sets: Sets = None, out: Out = None, as_json: Json = False, resume: Resume = False, overwrite: Overwrite = False,
    engine: Engine = "simulation", evaluate_every: Every = 1, precision: Precision = 32,
    no_check: NoCheck = False, no_cache: NoCache = False, compile: Compile = "auto",
    client_state: ClientState = "memory", keep: Keep = None,
    poc: Annotated[
        bool, typer.Option("--poc", help="With --engine nvflare: provisioned, mutual TLS, a process for each site.")
    ] = False,
):  # fmt: skip
    """Run one algorithm on a task, or an application of yours; a task takes the best known settings without --set."""
    from ..errors import check

    check(engine == "nvflare" or not (poc and is_app(task)), "--poc goes with --engine nvflare.")
    plan = plan_of(
        context, task, None if algorithm is None else [algorithm], alone=is_app(task), dataset=dataset,
        data_dir=data_dir, partition=partition, alpha=alpha, clients=clients, cohort=cohort, iterations=iterations,
        rounds=rounds, model=model, seed=seed, sets=sets, engine=engine, evaluate_every=evaluate_every, precision=precision,
        no_check=no_check, compile=compile, client_state=client_state,
        keep=keep,
    )  # fmt: skip
    if is_app(task):
        from .apps import run_app

        settings = {"iterations": iterations, "rounds": rounds, "cohort": cohort, "seed": seed, "keep": keep}
        run_app(task, plan, out, poc=poc, resume=resume, overwrite=overwrite, as_json=as_json,
                settings=settings | {"check": False if no_check else None})  # fmt: skip
    else:
        execute(plan, out, resume, overwrite, as_json)


@app.command()
def deploy(
    file: Annotated[str, typer.Argument(help="The Python file of an application.")],
    out: Annotated[str, typer.Option("--out", help="Folder for the job.")],
    clients: Annotated[int, typer.Option("--clients", help="How many sites have to be connected to start.")] = 1,
    iterations: Iterations = None, rounds: Rounds = None, cohort: Cohort = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Decides cohorts and minibatches.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from where the server and the sites stand.")] = False,
    keep: Keep = None,
    tune: Annotated[bool, typer.Option("--tune", help="Have candidates race in --rounds, as by `tune`.")] = False,
    metric: JudgedBy = None, candidates: HowMany = None, batch_size: BatchSize = None, max_bytes: MaxBytes = None,
):  # fmt: skip
    """Write an NVIDIA FLARE job of an application, for an operator to submit with nvflare's own tools."""
    from .apps import deploy_app
    from .tune import told_of

    settings = {"iterations": iterations, "rounds": rounds, "cohort": cohort, "seed": seed, "keep": keep}
    deploy_app(
        file, out, clients, resume, settings, told_of(file, tune, rounds, metric, candidates, batch_size, max_bytes)
    )


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def launch(
    context: typer.Context,
    script: Annotated[str, typer.Argument(help="A Python file; what follows it are its own arguments.")],
    processes: Annotated[
        int | None,
        typer.Option("--processes", help="How many to start here; default two, within mpirun or srun one."),
    ] = None,
    coordinator: Annotated[
        str | None, typer.Option("--coordinator", help="Over several machines: HOST:PORT of process 0.")
    ] = None,
    of: Annotated[int | None, typer.Option("--of", help="How many processes there are on all machines.")] = None,
    first: Annotated[int, typer.Option("--first", help="Which of all is the first on this machine.")] = 0,
):
    """Run a script as several processes that share one simulation (see the page "Several machines")."""
    from ..launch.launcher import launch as start

    start(script, context.args, processes, coordinator=coordinator, of=of, first=first)


@app.command(cls=Command)
def compare(
    context: typer.Context,
    task: TaskOrApp,
    algorithms: Annotated[str, typer.Option("--algorithms", help="Names, separated by commas.")] = "aggitd,fednest",
    seeds: Annotated[int, typer.Option("--seeds", help="How many seeds, from --seed on.")] = 3,
    dataset: Dataset = None, data_dir: DataDir = None, partition: Partition = None, alpha: Alpha = None,
    clients: Clients = None, cohort: Cohort = None, iterations: Iterations = None, rounds: Rounds = None,
    model: Model = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="The first seed; 0, or what an application's file says.")
    ] = None,
    sets: Sets = None, out: Out = None, as_json: Json = False, resume: Resume = False, overwrite: Overwrite = False,
    engine: Engine = "simulation", evaluate_every: Every = 1, precision: Precision = 32,
    no_check: NoCheck = False, no_cache: NoCache = False, compile: Compile = "auto",
    client_state: ClientState = "memory", keep: Keep = None,
):  # fmt: skip
    """Run several algorithms on the same task or application, data, cohorts and seeds."""
    from ..errors import check

    names = chosen_names(algorithms)
    check(seeds >= 1, f"--seeds is how many seeds to run, at least 1; got {seeds}.")
    check(not (is_app(task) and engine == "nvflare"), "compare runs in simulation: take another --engine.")
    plan = plan_of(
        context, task, names, seeds, dataset=dataset, data_dir=data_dir, partition=partition, alpha=alpha,
        clients=clients, cohort=cohort, iterations=iterations, rounds=rounds, seed=seed, sets=sets, engine=engine,
        evaluate_every=evaluate_every, precision=precision, no_check=no_check, compile=compile, client_state=client_state,
        keep=keep, model=model,
    )  # fmt: skip
    execute(plan, out, resume, overwrite, as_json)


@app.command(cls=Command)
def protocol(
    context: typer.Context,
    task: TaskOrApp,
    algorithm: Annotated[
        str | None, typer.Option("--algorithm", help="aggitd, fednest, ... (see `list`); default the task's, mostly aggitd.")
    ] = None,
    dataset: Dataset = None, data_dir: DataDir = None, partition: Partition = None, alpha: Alpha = None,
    model: Model = None, clients: Clients = None, cohort: Cohort = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Decides the partition and the start.")] = None,
    sets: Sets = None, as_json: Json = False, precision: Precision = 32, no_cache: NoCache = False, keep: Keep = None,
):  # fmt: skip
    """Print what one iteration exchanges: rounds and bytes, from the algorithm's own program."""
    import jax

    plan = plan_of(
        context, task, None if algorithm is None else [algorithm], dataset=dataset, data_dir=data_dir,
        partition=partition, alpha=alpha, model=model, clients=clients, cohort=cohort, seed=seed, sets=sets,
        precision=precision, keep=keep,
    )  # fmt: skip
    with jax.enable_x64(plan.precision == 64):
        name, seed = next(iter(plan.algorithms)), plan.seeds[0]
        table = plan.describe(plan.source.build(seed), name, seed).protocol()
    print(table.to_json() if as_json else table)


@app.command()
def check(
    algorithm: Annotated[str | None, typer.Argument(help="An algorithm; default all.")] = None,
    no_cache: NoCache = False,
):
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
