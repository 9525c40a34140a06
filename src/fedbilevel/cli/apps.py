"""What the command line does with an application's file: simulate it, run it over nvflare on this machine, deploy it."""

from __future__ import annotations

import csv
import importlib.util
import json
import statistics
from collections.abc import Mapping
from pathlib import Path

from ..app import load_app
from ..compare import Outcome, Plan
from ..errors import RunError, check
from ..given import JSON
from ..metrics import STOPPED
from ..results.folder import CHECKPOINT, HISTORY, OUTCOME, ROUNDS, TABLES
from ..sampled import Sampled
from ..tables.prepared import PREPARED
from .execute import say_best, say_compiled, say_stopped, started


def run_app(
    file: str, plan: Plan, out: str | None, *, poc: bool, resume: bool, overwrite: bool, as_json: bool,
    settings: Mapping[str, int | str | None],
) -> None:  # fmt: skip
    """Run an application; its results go to the folder `out`, by default named after the app."""
    place = out or f"{plan.source.name}-results"
    if plan.engine == "nvflare":
        need_nvflare()
        from ..engines.nvflare.launch import run

        source = plan.source
        assert isinstance(source, Sampled)  # an application's plan
        sites = len(source.sites)
        folder = plan.open(place, sites, resume, overwrite)
        run(file, source.app, folder, sites, chosen(settings), poc=poc, resume=resume)
        outcomes = []
    else:
        if resume:
            missing = f"there is no checkpoint in {place}: nothing to resume."
            check((Path(place) / CHECKPOINT).is_file(), missing)
        outcomes, opened = started(plan, place, resume, overwrite)
        assert opened is not None
        folder = opened
    _figures(folder)
    for outcome in outcomes:
        if outcome.failure:
            raise RunError(outcome.failure)
    _show(folder, outcomes, as_json, plan.keep)


def deploy_app(
    file: str, out: str, clients: int, resume: bool, settings: Mapping[str, int | str | None],
    tuning: Mapping[str, JSON] | None = None,
) -> None:  # fmt: skip
    """Write the job folder, and say how to submit it."""
    check(clients >= 1, f"--clients is how many sites have to be connected, at least 1; got {clients}.")
    need_nvflare()
    from ..engines.nvflare.job import export

    load_app(file).with_(**settings).check_sites(clients)
    place = export(file, out, chosen(settings), clients, resume=resume, tuning=tuning)
    print(f"Written to {place}: a job for NVIDIA FLARE. Submit it with: nvflare job submit -j {place}")


def need_nvflare() -> None:
    """Refuse, with what to install, where nvflare is missing."""
    there = importlib.util.find_spec("nvflare") is not None
    check(there, "nvflare is not installed: pip install 'fedbilevel[nvflare]'.")


def chosen(settings: Mapping[str, int | str | None]) -> dict[str, int | str]:
    """The settings that were given."""
    return {name: value for name, value in settings.items() if value is not None}


def _figures(folder: Path) -> None:
    """Tables and figures of its history, if it got as far as that."""
    from ..results import report

    if (folder / HISTORY).is_file() and len(_lines(folder / HISTORY)):
        report.write(folder, report.read(folder))


def _show(folder: Path, outcomes: list[Outcome], as_json: bool, keep: str | None) -> None:
    """The last row of the history, who failed how often, where it was the best, and why it was stopped, if it was."""
    from ..results import report

    number = lambda text: int(text) if text.lstrip("-").isdigit() else float(text) if text else None
    row = _lines(folder / HISTORY)[-1]
    reason = row.pop(STOPPED, "")
    last: dict[str, float | str | None] = {name: number(text) for name, text in row.items()}
    rounds = folder / ROUNDS
    if rounds.is_file():
        book = _lines(rounds)
        last["median_round_seconds"] = statistics.median(float(line["seconds"]) for line in book)
        last["rounds_with_failures"] = sum(line["failed"] != "" for line in book)
    last["step_sizes"] = next(iter(report.steps_of(folder).values()), "")  # of the one algorithm
    if as_json:
        print(json.dumps(last | {STOPPED: reason} if reason else last))
    else:
        _print(folder, last)
        say_compiled(outcomes)
        say_tables(folder)
    if keep is not None:
        say_best(keep, json.loads((folder / OUTCOME).read_text())["best"], as_json)
    if reason:
        say_stopped(reason, as_json)


def say_tables(folder: Path) -> None:
    """What it took that sites agreed on how their tables become rows, where they did."""
    outcome = json.loads((folder / OUTCOME).read_text()) if (folder / OUTCOME).is_file() else {}
    if took := outcome.get(TABLES):
        print(
            f"prepared tables: {took['exchanges']} exchanges before the first round, {took['bytes_down']:,} bytes down and "
            f"{took['bytes_up']:,} up, in no other column; how, is in {PREPARED}."
        )


def _print(folder: Path, last: Mapping[str, float | str | None]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "at the end")
    for name, value in last.items():
        number = f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else value
        table.add_row(name, "not taken" if number is None else number)
    Console().print(table)
    print(f"Written to {folder}: {', '.join(sorted(file.name for file in folder.iterdir() if file.is_file()))}")


def _lines(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as text:
        return list(csv.DictReader(text))
