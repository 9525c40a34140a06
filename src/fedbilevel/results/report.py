"""Tables and figures of runs: from histories, or from a results folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from ..errors import InputError, check
from ..metrics import STOPPED
from ..settings import told_apart
from .folder import CANDIDATES, configuration
from .text import Text, pipe_table

Cell = str | float | np.number | None  # of a table
Look = dict[str, Any]  # how a curve looks, in the words of matplotlib
LEVELS = (0.80, 0.85, 0.88, 0.90)  # test accuracies whose first round the summary names
AXES = {"rounds": "communication rounds", "megabytes": "payload, MB (down and up)", "seconds": "seconds of computation"}
UNMEASURED = "hypergradient_norm"  # what is drawn of a run that has no metric
MARK = "candidates dropped"  # at the vertical lines of a race
LOGARITHMIC = ("stationarity", "distance", UNMEASURED)
FIXED = ("algorithm", "seed", "iteration", "rounds", "bytes_down", "bytes_up", "seconds")
DIAGNOSTICS = ("hypergradient_norm", "vector_growth", "vector_residual", "lower_gradient_norm", "turn", "candidates")
DERIVED = ("megabytes", "megabytes_up", "oracle_calls")


def read(folder: str | Path) -> pandas.DataFrame:
    """The history of a results folder, as a DataFrame.

    Raises:
        InputError: no such folder, no history in it, or one that cannot be read.
    """
    file = Path(folder) / "history.csv"
    check(Path(folder).is_dir(), f"there is no folder {folder}.")
    check(file.is_file(), f"{folder} holds no history.csv: name the --out folder of a run or a comparison.")
    try:
        frame = pandas.read_csv(file)
    except Exception as error:  # whatever pandas finds wrong with it
        raise InputError(f"{file} cannot be read as a table ({type(error).__name__}).") from error
    if not {"algorithm", "seed"} & set(frame.columns):  # an app's own folder: one run
        frame.insert(0, "algorithm", next(iter(steps_of(folder)), Path(folder).resolve().name))
        frame.insert(1, "seed", 0)
    missing = [c for c in FIXED if c not in frame.columns]
    check(not missing, f"{file} has no column {', '.join(missing)}: it is no history of ours.")
    check(len(frame), f"{file} has no rows: let the run write some.")
    words = [c for c in FIXED[1:] if not pandas.api.types.is_numeric_dtype(frame[c])]
    check(not words, f"{file} has no numbers in {', '.join(words)}: it is no history of ours.")
    return frame


def metrics_of(frame: pandas.DataFrame) -> list[str]:
    """The metrics in a history, most telling first."""
    return [c for c in frame.columns if c not in (*FIXED, *DIAGNOSTICS, *DERIVED, STOPPED)]


def summarise(frame: pandas.DataFrame, steps: Mapping[str, str] | None = None) -> pandas.DataFrame:
    """A row per algorithm: what it spent, where its metrics ended, and the first rounds at which accuracies were reached.

    Args:
        steps: where each algorithm's step sizes come from, for a column of that name.
    """
    rows = []
    for name, runs in frame.groupby("algorithm", sort=False):
        last = runs.loc[runs.groupby("seed")["iteration"].idxmax()]
        row: dict[str, Cell] = {
            "algorithm": str(name),
            "seeds": len(last),
            "iterations": _short(last["iteration"]),
            "rounds": _short(last["rounds"]),
        }
        for metric in metrics_of(frame):
            row[metric] = last[metric].mean()
            row[f"{metric}_sd"] = last[metric].std(ddof=0)
        if "test_accuracy" in frame.columns:
            row |= {f"rounds_to_{level:.0%}": first_round(runs, level) for level in LEVELS}
        row["megabytes_down"], row["megabytes_up"] = last["bytes_down"].mean() / 1e6, last["bytes_up"].mean() / 1e6
        row["seconds"] = last["seconds"].mean()
        if steps:
            row["step_sizes"] = steps.get(str(name), "")
        rows.append(row)
    return pandas.DataFrame(rows)


def first_round(runs: pandas.DataFrame, level: float) -> float:
    """Median over seeds of the first round with that test accuracy; NaN unless most seeds reach it."""
    reached = [seed["rounds"][seed["test_accuracy"] >= level].min() for _, seed in runs.groupby("seed")]
    return float(np.median([np.inf if np.isnan(r) else r for r in reached])) if reached else np.nan


def steps_of(folder: str | Path) -> dict[str, str]:
    """Where the step sizes of a folder's algorithms come from, as its config.json says; {} where it does not."""
    try:
        told = configuration(folder).get("steps")
    except InputError:  # its history can still be drawn
        told = None
    return {str(name): str(whence) for name, whence in told.items()} if isinstance(told, dict) else {}


def write(folder: Path, frame: pandas.DataFrame) -> list[Path]:
    """summary.csv, summary.md and the figures of a history in its folder; returns the files."""
    steps = steps_of(folder)
    summary = summarise(frame, steps)
    summary.to_csv(folder / "summary.csv", index=False)
    (folder / "summary.md").write_text(markdown(summary))
    return [folder / "summary.csv", folder / "summary.md", *draw(folder, frame, told_apart(steps), drops(folder))]


def drops(folder: Path) -> list[int]:
    """The rounds after which candidates of a race were dropped; none where there was no race."""
    file = folder / CANDIDATES
    if not file.is_file():
        return []
    with file.open(newline="", errors="replace") as text:
        found = {line.get("round") or "" for line in csv.DictReader(text)}
    return sorted(int(after) for after in found if after.isdigit())


def cells(summary: pandas.DataFrame) -> Text:
    """Headings and text cells of a summary, spreads beside their means."""
    columns = [c for c in summary.columns if not c.endswith("_sd")]
    text = lambda row, c: (
        _figure(c, row[c]) + (f" ± {_figure(c, row[c + '_sd'])}" if c + "_sd" in summary.columns else "")
    )
    return [c.replace("_", " ") for c in columns], [[text(row, c) for c in columns] for _, row in summary.iterrows()]


def markdown(summary: pandas.DataFrame) -> str:
    """The summary as a Markdown table."""
    return pipe_table(*cells(summary))


def show(summary: pandas.DataFrame, console: Console, labels: Mapping[str, str] | None = None) -> None:
    """The summary as a table in the terminal: a column per algorithm, headed by its label where it has one."""
    from rich.table import Table

    head, rows = cells(summary)
    grid = Table("", *[(labels or {}).get(row[0], row[0]) for row in rows], title="At the end")
    for i in range(1, len(head)):
        grid.add_row(head[i], *[row[i] for row in rows])
    console.print(grid)


def draw(
    folder: Path, frame: pandas.DataFrame, labels: Mapping[str, str] | None = None, marks: Sequence[int] = ()
) -> list[Path]:
    """One figure per metric: against rounds, bytes and seconds; mean and range over seeds.

    Of runs without a metric, the norm of the estimated hypergradient.

    Args:
        labels: what the legend calls an algorithm, where that is not its name.
        marks: rounds at which candidates of a race were dropped.
    """
    import matplotlib

    matplotlib.use("Agg")
    frame = frame.assign(megabytes=(frame["bytes_down"] + frame["bytes_up"]) / 1e6)
    without = [UNMEASURED] if frame.get(UNMEASURED, pandas.Series()).notna().any() else []
    files = {metric: folder / f"{metric}.png" for metric in metrics_of(frame) or without}
    for metric, file in files.items():
        figure_of(frame, metric, labels or {}, marks).savefig(file, dpi=130)
    return list(files.values())


def figure_of(frame: pandas.DataFrame, metric: str, labels: Mapping[str, str], marks: Sequence[int] = ()) -> Figure:
    """A metric against rounds, megabytes (a column of the frame, beside the history's) and seconds."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    for panel, (axis, what) in zip(figure.subplots(1, len(AXES), sharey=True), AXES.items(), strict=True):
        for colour, (name, runs) in enumerate(frame.groupby("algorithm", sort=False)):
            _curve(panel, *curves_of(runs, axis, metric), f"C{colour}", labels.get(str(name), str(name)))
        for at in np.interp(marks, frame["rounds"], frame[axis]) if marks else ():
            panel.axvline(at, color="grey", linestyle=":", linewidth=1.2, label=None if _marked(panel) else MARK)
        panel.set_xlabel(what)
        panel.grid(alpha=0.3)
        panel.set_xlim(left=0)
        if metric in LOGARITHMIC and (frame[metric] > 0).any():
            panel.set_yscale("log")
        if metric.endswith("accuracy"):
            panel.set_ylim(top=1)
    seeds, name = frame["seed"].nunique(), metric.replace("_", " ")
    figure.axes[0].set_ylabel(name)
    figure.axes[0].legend(loc="best", frameon=bool(marks))
    figure.suptitle(name + (f": mean and range over {seeds} seeds" if seeds > 1 else ""), fontsize=11)
    return figure


def _marked(panel: Axes) -> bool:
    return MARK in panel.get_legend_handles_labels()[1]


def _curve(panel: Axes, grid: np.ndarray, curves: np.ndarray, colour: str, label: str) -> None:
    """The mean of several seeds, and their range."""
    marker = "o" if len(grid) == 1 else None
    panel.plot(grid, curves.mean(axis=0), label=label, color=colour, linewidth=1.6, marker=marker)
    if len(curves) > 1:
        panel.fill_between(grid, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.2, linewidth=0)


def curves_of(runs: pandas.DataFrame, axis: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(grid, one curve per seed), interpolated up to where every seed has values."""
    taken = runs[runs[metric].notna()] if runs[metric].notna().any() else runs  # a run resumed with other metrics
    seeds = [seed.sort_values("iteration") for _, seed in taken.groupby("seed")]
    end = min(seed[axis].max() for seed in seeds)
    grid = np.linspace(0, end, 400) if end > 0 else np.zeros(1)  # a run that blew up at once has its start only
    return grid, np.stack([np.interp(grid, seed[axis], seed[metric]) for seed in seeds])


def to_json(summary: pandas.DataFrame) -> str:
    """The summary as JSON records; what was not reached is null."""
    rows = summary.replace([np.inf, -np.inf], np.nan).astype(object)
    return json.dumps(rows.where(rows.notna(), None).to_dict(orient="records"), indent=2)


def _short(values: pandas.Series) -> str | int:
    low, high = int(values.min()), int(values.max())
    return low if low == high else f"{low}-{high}"


def _figure(column: str, value: str | float | np.number) -> str:
    if isinstance(value, str):
        return value
    if column.startswith("rounds_to"):
        return f"{value:.0f}" if np.isfinite(value) else "never"
    if column.endswith("accuracy") or column.endswith("accuracy_sd"):
        return f"{value:.2%}"
    if column in ("seeds", "iterations", "rounds"):
        return str(value)
    return f"{value:.4g}"
