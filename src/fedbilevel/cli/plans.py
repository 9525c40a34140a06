"""What the words of a command mean: a plan, on a task or on an application's sample data."""

from __future__ import annotations

import dataclasses
from typing import TypedDict, Unpack

import typer

from ..best import goal
from ..compare import Plan, Shipped
from ..engines import ENGINES
from ..engines.simulated.compiling import check_way
from ..engines.simulated.room import IN_MEMORY, check_place
from ..errors import check, unknown_name
from ..settings import algorithm_class, name_of, parse
from ..tasks import TASKS, Options

DEFAULT_ROUNDS = 300
SITES = 3  # of an application, unless --clients says
_OF_TASKS = ("dataset", "data_dir", "partition", "alpha", "model", "evaluate_every", "precision")


class Words(TypedDict, total=False):
    """Options that commands share, as they were given."""

    dataset: str | None
    data_dir: str | None
    partition: str | None
    alpha: float | None
    model: str | None
    clients: int | None
    cohort: int | None
    iterations: int | None
    rounds: int | None
    seed: int | None
    sets: list[str] | None
    engine: str
    evaluate_every: int
    precision: int
    no_check: bool
    compile: str
    client_state: str
    keep: str | None


def is_app(task: str) -> bool:
    """Whether a command's first word is an application's file."""
    return task.endswith(".py")


def plan_of(
    context: typer.Context, task: str, algorithms: list[str] | None, seeds: int = 1, alone: bool = False,
    **words: Unpack[Words],
) -> Plan:  # fmt: skip
    """The plan of a command.

    Args:
        algorithms: by name; None: an application's own, or AggITD.
        seeds: how many.
        alone: whether an application's run lies in the folder itself.

    Raises:
        InputError: a word means nothing, or does not go with the others.
    """
    check(words.get("iterations") is None or words.get("rounds") is None, "give --iterations or --rounds, not both.")
    if (keep := words.get("keep")) is not None:
        goal(keep)
    if is_app(task):
        _only_for_tasks(context)
        plan = _of_app(task, algorithms, seeds, alone, words)
    else:
        plan = _of_task(task, algorithms, seeds, words)
    plan = _compiled(plan, words.get("compile", "auto"))
    return _with_states_in(plan, words.get("client_state", IN_MEMORY))


def _compiled(plan: Plan, how: str) -> Plan:
    """The plan, compiled as `--compile` says."""
    check(
        how == "auto" or plan.engine == "simulation",
        f"--compile is for --engine simulation; the engine is {plan.engine}.",
    )
    check_way(how)
    return dataclasses.replace(plan, compile=how)


def _with_states_in(plan: Plan, place: str) -> Plan:
    """The plan, with clients' states where `--client-state` says."""
    check(
        place == IN_MEMORY or plan.engine == "simulation",
        f"--client-state is for --engine simulation; the engine is {plan.engine}.",
    )
    check_place(place)
    return dataclasses.replace(plan, client_state=place)


def _of_task(task: str, algorithms: list[str] | None, seeds: int, words: Words) -> Plan:
    precision, engine = words.get("precision", 32), words.get("engine", "simulation")
    check(precision in (32, 64), f"--precision is 32 or 64; got {precision}.")
    check(engine != "nvflare", "--engine nvflare is for an application: name its Python file (docs: Deploy).")
    for name, known in ((task, TASKS), (engine, ENGINES)):
        if name not in known:
            raise unknown_name("task" if known is TASKS else "engine", name, known)
    algorithms = algorithms or [TASKS[task].algorithm]
    settings = parse(words.get("sets") or [], {name: algorithm_class(name) for name in algorithms})
    options = Options(
        dataset=words.get("dataset"), data_dir=words.get("data_dir"), clients=words.get("clients"),
        partition=words.get("partition") or TASKS[task].partition, alpha=words.get("alpha"),
        model=words.get("model"),
    )  # fmt: skip
    iterations, rounds, first = words.get("iterations"), words.get("rounds"), words.get("seed") or 0
    return Plan(
        Shipped(task, options), settings, tuple(range(first, first + seeds)), iterations,
        DEFAULT_ROUNDS if iterations is None and rounds is None else rounds, words.get("cohort"), engine,
        words.get("evaluate_every", 1), precision, not words.get("no_check", False), keep=words.get("keep"),
    )  # fmt: skip


def _of_app(file: str, algorithms: list[str] | None, seeds: int, alone: bool, words: Words) -> Plan:
    from ..app import load_app
    from ..sampled import Sampled

    engine, clients, sets = words.get("engine", "simulation"), words.get("clients"), words.get("sets") or []
    if engine not in (*ENGINES, "nvflare"):
        raise unknown_name("engine", engine, (*ENGINES, "nvflare"))
    check(clients is None or clients >= 1, f"--clients is how many sites there are, at least 1; got {clients}.")
    check(
        engine != "nvflare" or not (algorithms or sets),
        "--algorithm and --set are for simulation: over a network every site runs what the application's file says.",
    )
    changed = {name: words.get(name) for name in ("iterations", "rounds", "cohort", "seed", "keep")}
    app = load_app(file).with_(**changed, check=False if words.get("no_check") else None)
    app.check_sites(sites := clients or SITES)
    source = Sampled(app, tuple(f"site-{i + 1}" for i in range(sites)))
    settings = parse(sets, source.kinds(algorithms or [name_of(type(app.algorithm))]))
    return source.plan(engine, settings, seeds, alone)


def chosen_names(text: str) -> list[str]:
    """Algorithms, separated by commas."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    check(names, "--algorithms takes names separated by commas, as in aggitd,fednest.")
    check(len(set(names)) == len(names), f"--algorithms names one twice: {text}.")
    return names


def given(context: typer.Context, name: str) -> bool:
    """Whether an option was given, and is no default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _only_for_tasks(context: typer.Context) -> None:
    """Refuse options that an application's file decides."""
    for name in _OF_TASKS:
        check(
            not given(context, name),
            f"--{name.replace('_', '-')} is for tasks: an application's file says it itself.",
        )
