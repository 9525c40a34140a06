"""Running a plan: its folder, its table, its figures, and how the command ends."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from ..best import goal
from ..compare import Outcome, Plan, run_all, table
from ..errors import InputError, check
from ..given import JSON
from ..results.folder import clear
from ..results.kept import figures_of


def execute(plan: Plan, out: str | None, resume: bool, overwrite: bool, as_json: bool) -> None:
    """Run a plan, write its folder, print its table; exit with 1 if a run failed."""
    from rich.console import Console

    from ..results import report

    check(out is not None or not (resume or overwrite), "--resume and --overwrite go with --out.")
    outcomes, folder = started(plan, out, resume, overwrite)
    frame = table(outcomes)
    summary = report.summarise(frame, plan.steps)
    files = [] if folder is None else report.write(folder, frame)
    if as_json:
        print(report.to_json(summary))
    else:
        report.show(summary, Console(), report.told_apart(plan.steps))
        if folder is not None:
            print(f"Written to {folder}: config.json, history.csv, {', '.join(file.name for file in files)}")
        say_compiled(outcomes)
    for outcome in outcomes:
        if outcome.result is not None and outcome.result.kept is not None:
            of = f" ({outcome.algorithm}, seed {outcome.seed})" if len(outcomes) > 1 else ""
            say_best(str(plan.keep), figures_of(outcome.result.kept), as_json, of)
    said(outcomes, as_json)


def say_best(keep: str, best: dict[str, JSON], as_json: bool, of: str = "") -> None:
    """Where a run was the best: on stdout, unless that is JSON."""
    wanted = goal(keep)
    where = f"iteration {best['iteration']}, round {best['rounds']}"
    print(
        f"best: {wanted.metric} {best['value']:.6g} ({wanted.direction}) at {where}{of}",
        file=sys.stderr if as_json else sys.stdout,
    )


def say_compiled(outcomes: list[Outcome]) -> None:
    """How the programs of runs were compiled."""
    ways = {}
    for outcome in outcomes:
        if outcome.result is not None:
            ways.setdefault(outcome.result.compiled, {})[outcome.algorithm] = None
    quick, full = (", ".join(ways.get(way, ())) for way in ("quick", "full"))
    if quick:
        rest = f" ({quick}), the rest in full" if full else ""
        print(f"compiled: quickly{rest}, which is sooner done; --compile full for the numbers of long runs.")


def started(plan: Plan, out: str | None, resume: bool, overwrite: bool) -> tuple[list[Outcome], Path | None]:
    """Run a plan in its folder; a plan that cannot run leaves nothing there."""
    first = plan.first()  # refuses a bad task, data set or partition before anything is written
    for name in plan.algorithms:
        plan.choose(name)
    folder = None if out is None else plan.open(out, first.data.clients, resume, overwrite)
    try:
        return run_all(plan, folder, resume, first=first), folder
    except InputError:
        if folder is not None and not resume:
            clear(folder)  # nothing ran: leave nothing that the corrected command would stumble over
        raise


def say_stopped(reason: str, as_json: bool) -> None:
    """Why a run was stopped: on stdout, unless that is JSON."""
    print(f"stopped: {reason}", file=sys.stderr if as_json else sys.stdout)


def said(outcomes: list[Outcome], as_json: bool) -> None:
    """Last lines: what stopped a run, on stdout unless that is JSON; and what failed, with exit code 1."""
    for outcome in outcomes:
        if outcome.stopped is not None:
            of = f" ({outcome.algorithm}, seed {outcome.seed})" if len(outcomes) > 1 else ""
            say_stopped(outcome.stopped + of, as_json)
    failures = [outcome for outcome in outcomes if outcome.failure]
    for outcome in failures:
        print(f"failed: {outcome.algorithm}, seed {outcome.seed}: {outcome.failure}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)
