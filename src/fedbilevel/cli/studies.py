"""Subcommands about what runs have left, and the studies of the results page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import DataDir, Json, app


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
    from ..errors import check, unknown_name
    from ..experiments import catalogue

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
        place = catalogue.folder_of(study, folder, name == "all")
        files = catalogue.reproduce(study, place, small=quick, data_dir=data_dir, checked_in=checked_in)
        for table in [file for file in files if file.suffix == ".md"]:
            print(f"\n{table.stem}\n{table.read_text()}", end="")
        print(f"{study}: written to {place}: {', '.join(str(file.relative_to(place)) for file in files)}")
