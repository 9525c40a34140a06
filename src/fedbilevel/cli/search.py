"""The subcommand that looks for step sizes, and files them where `run` and `compare` find them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..tune.filed import Filed, searched
from .options import (
    Alpha,
    Clients,
    Cohort,
    Command,
    DataDir,
    Dataset,
    Iterations,
    Json,
    Model,
    NoCache,
    Partition,
    Precision,
    Rounds,
    Sets,
    TaskOrApp,
    app,
)
from .plans import chosen_names, plan_of

_FIRST = 10  # seeds that no table or figure uses


@app.command(cls=Command)
def search(
    context: typer.Context,
    task: TaskOrApp,
    algorithms: Annotated[
        str | None, typer.Option("--algorithms", help="Names, separated by commas; default as `run` takes it.")
    ] = None,
    grid: Annotated[
        list[str] | None, typer.Option("--grid", help="step=value,value,..., repeatable, as in outer_lr=0.1,1.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="What is judged; the outer loss over all clients, unless named.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="How many seeds a point is judged on.")] = 2,
    seed: Annotated[int, typer.Option("--seed", help="The first of them.")] = _FIRST,
    dataset: Dataset = None, data_dir: DataDir = None, partition: Partition = None, alpha: Alpha = None,
    clients: Clients = None, cohort: Cohort = None, iterations: Iterations = None, rounds: Rounds = None,
    model: Model = None,
    sets: Sets = None, precision: Precision = 32, as_json: Json = False, no_cache: NoCache = False,
    out: Annotated[str | None, typer.Option("--out", help="Folder for a table of every point that was tried.")] = None,
    keep: Annotated[bool, typer.Option("--keep/--no-keep", help="File the best ones in your store.")] = True,
):  # fmt: skip
    """Look for the best step sizes, each algorithm on the same grid, and keep them for `run` and `compare`."""
    from ..errors import check

    check(seeds >= 1, f"--seeds is how many seeds a point is judged on, at least 1; got {seeds}.")
    plan = plan_of(
        context, task, None if algorithms is None else chosen_names(algorithms), seeds, dataset=dataset,
        data_dir=data_dir, partition=partition, alpha=alpha, clients=clients, cohort=cohort, iterations=iterations,
        rounds=rounds, model=model, seed=seed, sets=sets, precision=precision,
    )  # fmt: skip
    found = searched(plan, _values(grid or []) or None, metric)
    if out is not None:
        print(f"Written to {_written(Path(out), found)}", file=sys.stderr)
    files = [each.keep() if keep else None for each in found]
    if as_json:
        print(json.dumps([each.plain() for each in found], indent=2))
    else:
        _show(found)
        _tell(found, files)


def _values(words: list[str]) -> dict[str, tuple[float, ...]]:
    """`["outer_lr=0.1,1"]` -> the grid."""
    from ..errors import InputError

    grid = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            grid[name] = tuple(float(value) for value in text.split(","))
        except ValueError:
            raise InputError(f"--grid takes step=value,value,..., as in outer_lr=0.1,1; got {word!r}.") from None
    return grid


def _written(folder: Path, found: list[Filed]) -> Path:
    """A table of every point that was tried."""
    import pandas

    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"algorithm": each.name, **point, each.found.metric: score}
        for each in found
        for point, score in each.found.tried
    ]
    pandas.DataFrame(rows).to_csv(folder / "grid.csv", index=False)
    return folder / "grid.csv"


def _show(found: list[Filed]) -> None:
    """The best of each algorithm, in a table."""
    from rich.console import Console
    from rich.table import Table

    steps = list(dict.fromkeys(name for each in found for name in each.found.settings))
    table = Table("algorithm", *steps, found[0].found.metric, "tried", title="Best step sizes")
    for each in found:
        values = [f"{each.found.settings[name]:g}" if name in each.found.settings else "-" for name in steps]
        marked = [
            f"{value} (edge)" if name in each.found.edge else value for name, value in zip(steps, values, strict=True)
        ]
        table.add_row(each.name, *marked, f"{each.found.score:.4g}", str(len(each.found.tried)))
    Console().print(table)


def _tell(found: list[Filed], files: list[Path | None]) -> None:
    """Where they are kept, or where they belong."""
    for each, file in zip(found, files, strict=True):
        if file is not None:
            print(f"{each.name}: kept in {file}, for run and compare")
        elif each.where is None:
            print(f"{each.name}: the application's own algorithm, so write them into its file")
