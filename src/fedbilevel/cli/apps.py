"""What the command line does with an application's file: simulate it, run it over nvflare on this machine, deploy it."""

from __future__ import annotations

import csv
import importlib.util
import json
import statistics
from collections.abc import Mapping
from pathlib import Path

from ..app import App, load_app


def run_app(
    file: str, *, engine: str, poc: bool, clients: int | None, out: str | None, resume: bool, overwrite: bool,
    as_json: bool, settings: Mapping[str, int | None],
) -> None:  # fmt: skip
    """Run an application; its results go to the folder `out`, by default beside the file, named after the app."""
    import jax

    from ..engines import ENGINES
    from ..errors import check, unknown_name

    if engine not in (*ENGINES, "nvflare"):
        raise unknown_name("engine", engine, (*ENGINES, "nvflare"))
    check(engine == "nvflare" or not poc, "--poc goes with --engine nvflare.")
    check(clients is None or clients >= 1, f"--clients is how many sites there are, at least 1; got {clients}.")
    app = load_app(file).with_(**settings)
    sites = clients or 3
    app.check_sites(sites)
    folder = _folder(Path(out or f"{app.name}-results"), resume, overwrite)
    if engine == "nvflare":
        need_nvflare()
        from ..engines.nvflare.launch import run

        run(file, app, folder, sites, chosen(settings), poc=poc, resume=resume)
    else:
        with jax.enable_x64(app.precision == 64):
            _simulate(app, engine, [f"site-{i + 1}" for i in range(sites)], folder, resume)
    _show(folder, as_json)


def deploy_app(file: str, out: str, clients: int, resume: bool, settings: Mapping[str, int | None]) -> None:
    """Write the job folder, and say how to submit it."""
    from ..errors import check

    check(clients >= 1, f"--clients is how many sites have to be connected, at least 1; got {clients}.")
    need_nvflare()
    from ..engines.nvflare.job import export

    load_app(file).with_(**settings).check_sites(clients)
    place = export(file, out, chosen(settings), clients, resume=resume)
    print(f"Written to {place}: a job for NVIDIA FLARE. Submit it with: nvflare job submit -j {place}")


def need_nvflare() -> None:
    """Refuse, with what to install, where nvflare is missing."""
    from ..errors import check

    there = importlib.util.find_spec("nvflare") is not None
    check(there, "nvflare is not installed: pip install 'fedbilevel[nvflare]'.")


def chosen(settings: Mapping[str, int | None]) -> dict[str, int]:
    """The settings that were given."""
    return {name: value for name, value in settings.items() if value is not None}


_OURS = ("history.csv", "rounds.csv", "outcome.json", "variables.npz", "checkpoint.eqx", "nvflare.log")


def _folder(folder: Path, resume: bool, overwrite: bool) -> Path:
    """The folder for results, empty unless the run goes on in it."""
    import shutil

    from ..errors import check

    check(not folder.exists() or folder.is_dir(), f"{folder} is a file: name a folder for the results.")
    used = folder.exists() and any(folder.iterdir())
    if resume:
        check((folder / "checkpoint.eqx").is_file(), f"there is no checkpoint in {folder}: nothing to resume.")
    elif used:
        check(overwrite, f"{folder} is not empty: name another folder, or add --resume to go on, or --overwrite.")
        ours = (folder / "history.csv").is_file() or (folder / "outcome.json").is_file()
        check(ours, f"{folder} is not empty and holds no results of ours: name another folder.")
        for name in _OURS:
            (folder / name).unlink(missing_ok=True)
        for name in ("nvflare", "poc", "job", "sites"):
            shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _simulate(app: App, engine: str, sites: list[str], folder: Path, resume: bool) -> None:
    from ..callbacks import CSV, Checkpoint, Progress
    from ..engines import ENGINES
    from ..result import save_variables
    from ..solve import solve

    x, y = app.begin()
    faults = {"faults": app.faults} if hasattr(ENGINES[engine], "faults") else {}  # of engines where clients can fail
    how = ENGINES[engine](**{"cohort": app.cohort, **faults})
    result = solve(
        app.problem, app.data(sites), app.algorithm, x, y, app.iterations, rounds=app.rounds, key=app.key, engine=how,
        callbacks=[CSV(folder / "history.csv"), Checkpoint(folder), Progress(app.name)], metrics=app.metrics,
        evaluate_every=app.evaluate_every, resume=folder if resume else None, check=app.check,
    )  # fmt: skip
    save_variables(result, folder / "variables.npz")


def _show(folder: Path, as_json: bool) -> None:
    """The last row of the history, and who failed how often."""
    from rich.console import Console
    from rich.table import Table

    number = lambda text: int(text) if text.lstrip("-").isdigit() else float(text) if text else None
    last: dict[str, float | None] = {name: number(text) for name, text in _lines(folder / "history.csv")[-1].items()}
    rounds = folder / "rounds.csv"
    if rounds.is_file():
        book = _lines(rounds)
        last["median_round_seconds"] = statistics.median(float(line["seconds"]) for line in book)
        last["rounds_with_failures"] = sum(line["failed"] != "" for line in book)
    if as_json:
        print(json.dumps(last))
        return
    table = Table("", "at the end")
    for name, value in last.items():
        shown = "not taken" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
        table.add_row(name, shown)
    Console().print(table)
    print(f"Written to {folder}: {', '.join(sorted(file.name for file in folder.iterdir() if file.is_file()))}")


def _lines(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as text:
        return list(csv.DictReader(text))
