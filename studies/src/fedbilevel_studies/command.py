"""`fedbilevel reproduce`: the command line of the studies, found by fedbilevel's own as an entry point."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command()
def reproduce(
    name: Annotated[str | None, typer.Argument(help='A study, or "all" (see --list).')] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The same in minutes, on embedded data.")] = False,
    out: Annotated[str | None, typer.Option("--out", help="Folder for tables and figures; runs go on in it.")] = None,
    data_dir: Annotated[str | None, typer.Option("--data-dir", help="Folder that holds the data set's files.")] = None,
    checked_in: Annotated[
        bool, typer.Option("--checked-in", help="Take the step sizes that the grid found before, without a new search.")
    ] = False,
    as_list: Annotated[bool, typer.Option("--list", help="List the studies.")] = False,
):
    """Run a study of the results page again: the grid, the seeds, tables and figures."""
    from fedbilevel.errors import check, unknown_name

    from . import catalogue

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
