"""The command line: parses, calls the library, prints. Exit codes: 0 done, 1 the run failed, 2 bad usage."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="fedbilevel",
    help="Federated bilevel optimisation: run, compare and inspect algorithms.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Task = Annotated[
    str, typer.Argument(help="quadratic, ridge, regularisation, hyper-representation or loss-tuning (see `list`).")
]
TaskOrApp = Annotated[str, typer.Argument(help="A task (see `list`), or the Python file of an application of yours.")]
Dataset = Annotated[str | None, typer.Option("--dataset", help="Data set; the task's default is embedded.")]
DataDir = Annotated[str | None, typer.Option("--data-dir", help="Folder that holds the data set's files.")]
Partition = Annotated[str, typer.Option("--partition", help="iid, shards, dirichlet or quantity.")]
Alpha = Annotated[float | None, typer.Option("--alpha", help="Concentration of dirichlet and quantity.")]
Clients = Annotated[int | None, typer.Option("--clients", help="How many clients there are.")]
Cohort = Annotated[int | None, typer.Option("--cohort", help="How many clients each exchange asks; default all.")]
Iterations = Annotated[int | None, typer.Option("--iterations", help="Outer iterations.")]
Rounds = Annotated[
    int | None, typer.Option("--rounds", help="Communication rounds; the whole iterations that fit are run.")
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="name=value, repeatable; in compare also algorithm.name=value.")
]
Out = Annotated[str | None, typer.Option("--out", help="Folder for config, history, summary and figures.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the --out folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the results in the --out folder.")]
Engine = Annotated[str, typer.Option("--engine", help="simulation, loopback, or for an application nvflare.")]
Every = Annotated[int, typer.Option("--evaluate-every", help="Iterations between evaluations.")]
Precision = Annotated[int, typer.Option("--precision", help="32 or 64 bits.")]

DEFAULT_ROUNDS = 300
_INTERRUPTED = 130  # what typer makes of Ctrl-C
_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")


@app.command()
def run(
    context: typer.Context,
    task: TaskOrApp,
    algorithm: Annotated[str, typer.Option("--algorithm", help="aggitd, fednest, ... (see `list`).")] = "aggitd",
    dataset: Dataset = None, data_dir: DataDir = None, partition: Partition = "iid", alpha: Alpha = None,
    clients: Clients = None, cohort: Cohort = None, iterations: Iterations = None, rounds: Rounds = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Decides the partition, the start and the run.")] = None,
    sets: Sets = None, out: Out = None, as_json: Json = False, resume: Resume = False, overwrite: Overwrite = False,
    engine: Engine = "simulation", evaluate_every: Every = 1, precision: Precision = 32,
    poc: Annotated[
        bool, typer.Option("--poc", help="With --engine nvflare: provisioned, mutual TLS, a process for each site.")
    ] = False,
):  # fmt: skip
    """Run one algorithm on a task, or an application of yours; a task takes the checked-in best settings without --set."""
    if task.endswith(".py"):
        from .cli_app import run_app

        _only_for_apps(context)
        settings = {"iterations": iterations, "rounds": rounds, "cohort": cohort, "seed": seed}
        run_app(task, engine=engine, poc=poc, clients=clients, out=out, resume=resume, overwrite=overwrite,
                as_json=as_json, settings=settings)  # fmt: skip
        return
    plan = _plan(task, [algorithm], (seed or 0,), sets, iterations, rounds, cohort, engine, evaluate_every, precision,
                 dataset=dataset, data_dir=data_dir, partition=partition, alpha=alpha, clients=clients)  # fmt: skip
    _execute(plan, out, resume, overwrite, as_json)


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
    from .cli_app import deploy_app

    settings = {"iterations": iterations, "rounds": rounds, "cohort": cohort, "seed": seed}
    deploy_app(file, out, clients, resume, settings)


def _only_for_apps(context: typer.Context) -> None:
    """Refuse options that an application's file decides."""
    from .errors import check

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
):  # fmt: skip
    """Run several algorithms on the same task, data, cohorts and seeds."""
    from .errors import check

    names = [name.strip() for name in algorithms.split(",") if name.strip()]
    check(names, "--algorithms takes names separated by commas, as in aggitd,fednest.")
    check(len(set(names)) == len(names), f"--algorithms names one twice: {algorithms}.")
    check(seeds >= 1, f"--seeds is how many seeds to run, at least 1; got {seeds}.")
    several = tuple(range(seed, seed + seeds))
    plan = _plan(task, names, several, sets, iterations, rounds, cohort, engine, evaluate_every, precision,
                 dataset=dataset, data_dir=data_dir, partition=partition, alpha=alpha, clients=clients)  # fmt: skip
    _execute(plan, out, resume, overwrite, as_json)


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

    from .protocol import protocol as derive

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
    from .algorithms import ALGORITHMS, BIASED, checked
    from .settings import algorithm_class
    from .testing import CheckFailed, check_algorithm

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
            print("         (it never forms a hypergradient: not compared)")
    if failed:
        raise typer.Exit(1)


@app.command("list")
def list_names(as_json: Json = False):
    """List the tasks, algorithms, partitions and engines."""
    from .algorithms import ALGORITHMS
    from .experiments.plan import ENGINES
    from .partition import PARTITIONS
    from .tasks import TASKS

    about = {name: (kind.__doc__ or "").strip().splitlines()[0] for name, kind in ALGORITHMS.items()}
    if as_json:
        tasks = {k.name: {"summary": k.summary, "datasets": k.datasets} for k in TASKS.values()}
        print(
            json.dumps(
                {"tasks": tasks, "algorithms": about, "partitions": list(PARTITIONS), "engines": list(ENGINES)},
                indent=2,
            )
        )
        return
    print("Tasks (data sets, the default first)")
    for kind in TASKS.values():
        print(f"  {kind.name:22}{kind.summary} ({', '.join(kind.datasets)})")
    print("Algorithms")
    for name, line in about.items():
        print(f"  {name:22}{line}")
    print(f"Partitions\n  {', '.join(PARTITIONS)}\nEngines\n  {', '.join(ENGINES)}; for an application nvflare too")


@app.command()
def plot(folder: Annotated[str, typer.Argument(help="The --out folder of a run or a comparison.")]):
    """Make the tables and figures of a results folder again."""
    from rich.console import Console

    from .experiments import report

    frame = report.read(folder)
    files = report.write(Path(folder), frame)
    report.show(report.summarise(frame), Console())
    print("\n".join(str(file) for file in files))


@app.command()
def cost(
    folder: Annotated[str, typer.Argument(help="The --out folder of a run or a comparison.")],
    latency: Annotated[
        str | None, typer.Option("--latency", help="What a round takes beyond transfer and computation, as in 200ms.")
    ] = None,
    up: Annotated[
        str | None, typer.Option("--up", help="A client's link to the server, as in 5Mbit/s or 1MB/s.")
    ] = None,
    down: Annotated[str | None, typer.Option("--down", help="The server's link to one client, as in 20Mbit/s.")] = None,
    network: Annotated[
        str | None,
        typer.Option(
            "--network", help="Instead: data-centre, hospitals, home-broadband, mobile-4g (assumptions) or all."
        ),
    ] = None,
    level: Annotated[
        float | None,
        typer.Option("--level", help="Test accuracy to reach, 0.9 by default; else the first metric's value."),
    ] = None,
    compute: Annotated[
        float, typer.Option("--compute", help="How many times slower a client computes; 0 leaves computation out.")
    ] = 1.0,
    cohort: Annotated[
        int | None, typer.Option("--cohort", help="How many clients an exchange asked; default as config.json says.")
    ] = None,
    server_up: Annotated[
        str | None, typer.Option("--server-up", help="The server's own link to all clients; default fast enough.")
    ] = None,
    server_down: Annotated[
        str | None, typer.Option("--server-down", help="All clients' link into the server; default fast enough.")
    ] = None,
    as_json: Json = False,
):
    """Predict how long the recorded runs take on a network, and say which algorithm to use there."""
    from rich.console import Console

    from .experiments import cost_report, report
    from .experiments.cost import advice, clients_an_exchange, predict
    from .experiments.network import choose

    networks = choose(network, latency, up, down, server_up, server_down)
    frame = report.read(folder)
    prediction = predict(frame, networks, clients_an_exchange(folder, cohort), level, compute)
    files = cost_report.write(Path(folder), prediction)
    if as_json:
        print(report.to_json(prediction.table))
    else:
        cost_report.show(prediction, Console())
        print(f"Written to {folder}: {', '.join(file.name for file in files)}\n{advice(prediction)}")


@app.command()
def reproduce(
    name: Annotated[str | None, typer.Argument(help='A study, or "all" (see --list).')] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The same in minutes, on embedded data.")] = False,
    out: Annotated[str | None, typer.Option("--out", help="Folder for tables and figures; runs go on in it.")] = None,
    data_dir: DataDir = None,
    checked_in: Annotated[
        bool, typer.Option("--checked-in", help="Take the step sizes that the grid found before, without a new search.")
    ] = False,
    as_list: Annotated[bool, typer.Option("--list", help="List the studies.")] = False,
):
    """Run a study of the results page again: the grid, the seeds, tables and figures."""
    from .errors import check, unknown_name
    from .experiments import catalogue

    known = catalogue.names()
    if as_list:
        print("\n".join(f"{study:28}{about}" for study, about in known.items()))
        return
    check(name is not None, "name a study, or all (fedbilevel reproduce --list names them).")
    check(out is not None, "--out DIR is where the study is kept.")
    assert name is not None and out is not None
    if name != "all" and name not in known:
        raise unknown_name("study", name, [*known, "all"])
    folder = Path(out)
    check(not folder.exists() or folder.is_dir(), f"{folder} is a file: name a folder for the study.")
    for study in known if name == "all" else [name]:
        place = folder / study if name == "all" else folder
        files = catalogue.reproduce(study, place, small=quick, data_dir=data_dir, checked_in=checked_in)
        for table in [file for file in files if file.suffix == ".md"]:
            print(f"\n{table.stem}\n{table.read_text()}", end="")
        print(f"{study}: written to {place}: {', '.join(str(file.relative_to(place)) for file in files)}")


def _plan(task, algorithms, seeds, sets, iterations, rounds, cohort, engine, evaluate_every, precision, **options: Any):
    from .errors import check, unknown_name
    from .experiments.plan import ENGINES, Plan
    from .settings import parse
    from .tasks import TASKS, Options

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


def _execute(plan, out: str | None, resume: bool, overwrite: bool, as_json: bool) -> None:
    """Run a plan, write its folder, print its table; exit with 1 if a run failed."""
    from rich.console import Console

    from .errors import InputError, check
    from .experiments import report
    from .experiments.plan import clear, prepare, run_all, table

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


def main() -> None:
    """Entry point: one sentence and exit code 2 for bad usage, 1 for a run that failed."""
    _keep_compiled_programs()
    from .errors import InputError, RunError

    try:
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except _UsageError as error:
        sys.exit(_say(f"{error.format_message()} (see fedbilevel --help)", 2))
    except InputError as error:
        sys.exit(_say(str(error), 2))
    except RunError as error:
        sys.exit(_say(str(error), 1))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_say("interrupted: what was run is kept with --out; the same command with --resume goes on.", 1))
    except OSError as error:
        sys.exit(_say(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), 1))


def _say(sentence: str, code: int) -> int:
    print(f"fedbilevel: {sentence}", file=sys.stderr)
    return code


def _keep_compiled_programs() -> None:
    """Let JAX keep compiled programs on disk, so that a second run starts at once (JAX_COMPILATION_CACHE_DIR moves it)."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        with contextlib.suppress(OSError):
            folder = Path(base) / "fedbilevel" / "xla"
            folder.mkdir(parents=True, exist_ok=True)
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)


if __name__ == "__main__":
    main()
