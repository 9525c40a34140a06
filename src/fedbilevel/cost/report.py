"""Tables and a figure of predicted times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from ..results.text import Text, pipe_table
from .model import ACCURACY, PARTS, Prediction, advice
from .network import duration, span

COLOURS = dict(zip(PARTS, ("#0072B2", "#E69F00", "#009E73"), strict=True))  # Okabe and Ito: told apart by everyone


def write(folder: Path, prediction: Prediction) -> list[Path]:
    """cost.csv, cost.md and cost.png; returns the files."""
    prediction.table.to_csv(folder / "cost.csv", index=False)
    table = pipe_table(*cells(prediction, "**{}**"))
    lines = "\n".join(f"- {line}" for line in [*setting(prediction), *advice(prediction).splitlines()])
    (folder / "cost.md").write_text(f"{_title(prediction)}; the soonest in bold.\n\n{table}\n{lines}\n")
    return [folder / "cost.csv", folder / "cost.md", draw(folder / "cost.png", prediction)]


def show(prediction: Prediction, console: Console) -> None:
    """The table in the terminal, and the numbers that it stands on."""
    head, rows = cells(prediction)
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for heading, justify in zip(head, ["left", *["right"] * (len(head) - 1)], strict=True):
        table.add_column(heading, justify=justify, no_wrap=heading != "MB a client")  # pyright: ignore[reportArgumentType]
    for row in rows:
        table.add_row(*row)
    console.print(f"{_title(prediction)}; * the soonest")
    console.print(table)
    for line in setting(prediction):
        console.print(line, soft_wrap=True, highlight=False)


def cells(prediction: Prediction, mark: str = "{}*") -> Text:
    """Headings and text cells: a row per algorithm; of several networks a row per network and a column per algorithm."""
    table, goal = prediction.table, prediction.goal
    if len(prediction.networks) > 1:
        rows = [[name, *_marked(prediction.on(name)["seconds"], mark)] for name in prediction.networks]
        return ["network", *table["algorithm"].unique()], rows
    columns = [_marked(table[goal.column(level)], mark) for level in goal.levels]
    rows = [
        [*_spent(row), *times] for (_, row), times in zip(table.iterrows(), zip(*columns, strict=True), strict=True)
    ]
    return ["algorithm", "rounds", "MB a client", "shares, %", *map(goal.name, goal.levels)], rows


def draw(path: Path, prediction: Prediction) -> Path:
    """Bars of predicted time by latency, transfer and computation: a panel per network, a bar per algorithm."""
    panels, bars = len(prediction.networks), prediction.table["algorithm"].nunique()
    figure = Figure(figsize=(8, 1 + panels * (0.8 + 0.3 * bars)), layout="constrained")
    for panel, (name, network) in zip(
        figure.subplots(panels, 1, squeeze=False)[:, 0], prediction.networks.items(), strict=True
    ):
        _bars(panel, prediction.on(name))
        panel.set_title(f"{name}: {network}", fontsize=9, loc="left")
    legend = figure.axes[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=len(PARTS), frameon=False)
    figure.suptitle(_title(prediction, of_all=False), fontsize=11)
    figure.savefig(path, dpi=130)
    return path


def setting(prediction: Prediction) -> list[str]:
    """The networks and the other numbers that the prediction stands on, a line each."""
    clients, compute = prediction.clients, prediction.compute
    lines = [f"{name}: {network}." for name, network in prediction.networks.items()]
    if len(lines) == 1:
        at = prediction.goal.name(prediction.goal.level)
        lines = [f"Rounds, MB and shares ({' / '.join(PARTS)}) are those to {at}.", *lines]
    share = f"{compute:g}/{clients} of the recorded seconds" if compute else "left out"
    return [*lines, f"{clients} clients an exchange; computation: {share}."]


def _bars(panel: Axes, rows: pandas.DataFrame) -> None:
    reached = np.isfinite(rows["seconds"].to_numpy())
    size, unit = span(rows["seconds"][reached].max()) if reached.any() else (1.0, "s")
    ends, places = np.zeros(len(rows)), np.arange(len(rows))
    for part, colour in COLOURS.items():
        width = np.where(reached, rows[f"seconds_{part}"], 0) / size
        panel.barh(places, width, left=ends, color=colour, label=part, edgecolor="white", linewidth=0.5, height=0.7)
        ends = ends + width
    for place, end, seconds in zip(places, ends, rows["seconds"], strict=True):
        panel.annotate(duration(seconds), (end, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    panel.set_yticks(places, rows["algorithm"])
    panel.invert_yaxis()
    panel.set_xlim(0, 1.12 * ends.max() or 1)
    panel.set_xlabel(f"predicted time, {unit}")
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _spent(row: pandas.Series) -> list[str]:
    """One algorithm's name, rounds, megabytes and shares of the time, at the level that decides."""
    if not np.isfinite(row["seconds"]):
        return [row["algorithm"], "-", "-", "-"]
    shares = [100 * row[f"seconds_{part}"] / (row["seconds"] or 1) for part in PARTS]
    megabytes = row["megabytes_down"] + row["megabytes_up"]
    return [row["algorithm"], f"{row['rounds']:.0f}", f"{megabytes:.3g}", " / ".join(f"{s:.0f}" for s in shares)]


def _marked(times: pandas.Series, mark: str) -> list[str]:
    """Times in words, the soonest marked."""
    best = min(times)
    return [mark.format(duration(t)) if t == best and np.isfinite(t) else duration(t) for t in times]


def _title(prediction: Prediction, of_all: bool = True) -> str:
    """What the table is of: times to several levels, or to one."""
    goal = prediction.goal
    if of_all and len(prediction.networks) == 1 and len(goal.levels) > 1:
        return "Predicted time to test accuracies"
    return f"Predicted time to {goal.name(goal.level)}" + (" test accuracy" if goal.metric == ACCURACY else "")
