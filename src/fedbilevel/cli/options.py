"""The command itself, and the options that its subcommands share."""

from __future__ import annotations

import os
from typing import Annotated

import typer
import typer.core

app = typer.Typer(
    name="fedbilevel",
    help="Federated bilevel optimisation: run, compare and inspect algorithms.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Command(typer.core.TyperCommand):
    """A command that hands on the context its function asks for; typer's own hands on one of a base class."""

    context_class = typer.Context


def _without_cache(given: bool) -> bool:
    from ..cache import ENVIRONMENT

    if given:  # nothing is compiled yet; the processes of sites inherit it
        os.environ[ENVIRONMENT] = "off"
    return given


TaskOrApp = Annotated[str, typer.Argument(help="A task (see `list`), or the Python file of an application of yours.")]
Dataset = Annotated[str | None, typer.Option("--dataset", help="Data set; the task's default is embedded.")]
DataDir = Annotated[str | None, typer.Option("--data-dir", help="Folder that holds the data set's files.")]
Partition = Annotated[
    str | None, typer.Option("--partition", help="iid, shards, dirichlet or quantity; default iid, of personal shards.")
]
Alpha = Annotated[float | None, typer.Option("--alpha", help="Concentration of dirichlet and quantity.")]
Model = Annotated[str | None, typer.Option("--model", help="mlp or cnn, for hyper-representation; default mlp.")]
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
Engine = Annotated[
    str, typer.Option("--engine", help="simulation, loopback, ... (see `list`); for an application also nvflare.")
]
Every = Annotated[int, typer.Option("--evaluate-every", help="Iterations between evaluations.")]
Keep = Annotated[
    str | None,
    typer.Option(
        "--keep", help="METRIC:min or METRIC:max: the best x and y by it are kept beside the last, in best.npz."
    ),
]
JudgedBy = Annotated[
    str | None,
    typer.Option("--metric", help="METRIC:min or METRIC:max, which candidates are judged by; else the outer loss."),
]
HowMany = Annotated[
    int | None, typer.Option("--candidates", help="How many race, the first of all; fewer where rounds are few.")
]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", help="Rows of a minibatch, fresh for every step; default all rows.")
]
MaxBytes = Annotated[int | None, typer.Option("--max-bytes", help="Payload, down and up, that is not exceeded.")]
NoCheck = Annotated[
    bool, typer.Option("--no-check", help="Do not look first whether the problem can mean what it says.")
]
NoCache = Annotated[
    bool,
    typer.Option("--no-cache", callback=_without_cache, help="Neither read nor keep compiled programs on disk."),
]
Compile = Annotated[
    str,
    typer.Option(
        "--compile", help="quick, full or auto: how the simulation is compiled; auto takes what is done sooner."
    ),
]
ClientState = Annotated[
    str,
    typer.Option("--client-state", help="memory, disk or a folder: where clients' states lie in a simulation."),
]
Precision = Annotated[int, typer.Option("--precision", help="32 or 64 bits.")]
