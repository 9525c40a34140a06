"""Subcommands about what runs have left in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, app


@app.command()
def plot(folder: Annotated[str, typer.Argument(help="The --out folder of a run or a comparison.")]):
    """Make the tables and figures of a results folder again."""
    from rich.console import Console

    from ..results import report

    frame = report.read(folder)
    files = report.write(Path(folder), frame)
    report.show(report.summarise(frame), Console())
    print("\n".join(str(file) for file in files))


@app.command()
def report(
    folder: Annotated[str, typer.Argument(help="The --out folder of a run, a comparison or a race, ended or not.")],
    out: Annotated[str | None, typer.Option("--out", help="The file; default report.html in the folder.")] = None,
):
    """Write a results folder as one page of HTML that asks no other host for anything."""
    from ..page import write

    print(f"Written to {write(folder, out)}")


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

    from ..cost import report as cost_report
    from ..cost.model import advice, clients_an_exchange, predict
    from ..cost.network import choose
    from ..results import report

    networks = choose(network, latency, up, down, server_up, server_down)
    frame = report.read(folder)
    prediction = predict(frame, networks, clients_an_exchange(folder, cohort), level, compute)
    files = cost_report.write(Path(folder), prediction)
    if as_json:
        print(report.to_json(prediction.table))
    else:
        cost_report.show(prediction, Console())
        print(f"Written to {folder}: {', '.join(file.name for file in files)}\n{advice(prediction)}")
