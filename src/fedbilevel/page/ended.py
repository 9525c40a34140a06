"""How each run ended, and who raced; what is missing from the folder."""

from __future__ import annotations

import csv
import math

from ..results.folder import CANDIDATES, OUTCOME
from ..results.kept import RESUMED
from .found import Found, Run
from .markup import listed, number, table, text

_MOST = 60  # runs in the table: all that did not just end come first
_QUIET = "done"


def ended(found: Found) -> str:
    """The part of the page."""
    runs = sorted(found.runs, key=lambda run: how(run)[0] == _QUIET)  # stable
    rows = []
    for run in runs[:_MOST]:
        word, why = how(run)
        mark = text(word) if word == _QUIET else f'<b class="warn">{text(word)}</b>'
        last = run.last("iteration"), run.last("rounds")
        rows.append([text(run.algorithm), str(run.seed), *map(number, last), mark, text(why)])
    more = [f"{len(runs) - _MOST:,} more runs: done."] if len(runs) > _MOST else []
    head = ["", "seed", "iteration", "round", "", ""]
    return table(head, rows) + listed(more) + _raced(found) + listed(found.missing, "dim")


def how(run: Run) -> tuple[str, str]:
    """How it ended: in a word, and in a sentence."""
    told = run.outcome
    status, at = str(told.get("status", "")), told.get("iterations")
    last = run.last("iteration")
    if not status:
        return ("not ended", f"no {OUTCOME}: killed, or it still runs") if run.place is not None else ("not told", "")
    sentence, notes = str(told.get("sentence", "")), []
    if status == "failed" and " blew up" in sentence:
        status = "diverged"
    if status == "running":
        status, notes = "running", ["or killed"]
    if status == _QUIET and told.get("stopped"):
        status, notes = "stopped", [str(told["stopped"])]
    if status in (_QUIET, "stopped") and isinstance(at, int) and math.isfinite(last) and last > at:
        notes.append(f"at iteration {at:,}; it went on, and has not ended since")
    if isinstance(told.get(RESUMED), int):
        notes.append(f"resumed at iteration {told[RESUMED]:,}")
    best = told.get("best")
    if isinstance(best, dict) and {"iteration", "value"} <= set(best):
        notes.append(f"the best, {best['value']}, at iteration {best['iteration']}")
    return status, "; ".join([*([sentence] if sentence else []), *notes])


def _raced(found: Found) -> str:
    """The candidates of a race; nothing where there was none."""
    file = found.folder / CANDIDATES
    if not file.is_file():
        return ""
    try:
        with file.open(newline="", errors="replace") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, csv.Error):
        return listed([f"{CANDIDATES} cannot be read."], "dim")
    score = lambda line: f"{float(line['score']):.4g}" if _is_number(line.get("score")) else "-"
    dropped = lambda line: f"round {line.get('round')}" if line.get("round") else "never"
    cells = [
        [text(line.get("name") or ""), text(line.get("tempo") or ""), score(line), text(dropped(line)),
         text(line.get("why") or "")]
        for line in rows[:_MOST]
    ]  # fmt: skip
    return "<h3>Candidates</h3>" + table(["", "tempo", "score", "dropped", ""], cells)


def _is_number(value: object) -> bool:
    try:
        return math.isfinite(float(str(value)))
    except ValueError:
        return False
