"""`fedbilevel reproduce family`: the studies of the whole family one after the other, and one table and figure of all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas

from .family import PARTS
from .kinds import Text
from .study import Study
from .tables import level_name, never, number, write_table

STUDIES = ("stationarity", *(study.name for study in PARTS), "speed-up")


def family(folder: Path, run: Callable[[str, Path], list[Path]], studies: dict[str, Study]) -> list[Path]:
    """Run the studies, each in FOLDER/STUDY; then FOLDER/family holds family.csv, .md, .tex and .png.

    Args:
        run: (name of a study, its folder) -> the files; what is finished there is kept.
        studies: those of `PARTS` as `run` takes them, by name.
    """
    for name in STUDIES:
        run(name, folder / name)
    frames = [
        pandas.read_csv(folder / study.name / "spent.csv").assign(study=study.name, task=study.task)
        for study in studies.values()
    ]
    frame = pandas.concat(frames, ignore_index=True)
    place = folder / "family"
    place.mkdir(exist_ok=True)
    return [*write_table(place, "family", frame, _text(frame, studies)), _draw(place / "family.png", frame, studies)]


def goal(study: Study) -> str:
    """The level that a study's algorithms are to reach, in words."""
    return f"{study.task}: {study.metric.replace('_', ' ')} {level_name(study, study.goal)}"


def _text(frame: pandas.DataFrame, studies: dict[str, Study]) -> Text:
    """A row an algorithm: what the goal of each task took, medians over seeds."""
    head = ["algorithm"]
    for study in studies.values():
        head += [f"{goal(study)}: rounds", "MB sent", "oracle calls"]
    rows = []
    for label, mine in frame.groupby("algorithm", sort=False):
        cells = [str(label)]
        for name, study in studies.items():
            row = mine[mine["study"] == name].iloc[0]
            some = f"{row['reached']} of {row['seeds']} seeds"
            if np.isfinite(row["rounds"]):
                few = f" ({some})" if row["reached"] < row["seeds"] else ""
                cells += [number(row["rounds"]) + few, number(row["megabytes_up"]), number(row["oracle_calls"])]
            else:
                cells += [some if row["reached"] else never(study, str(label)), "-", "-"]
        rows.append(cells)
    return head, rows


def _draw(path: Path, frame: pandas.DataFrame, studies: dict[str, Study]) -> Path:
    """A panel a task: every algorithm's rounds to the goal, the median and the range over seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    labels = list(dict.fromkeys(frame["algorithm"]))
    figure = Figure(figsize=(12.5, 1.2 + 0.27 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(studies), sharey=True, squeeze=False)[0]
    for panel, (name, study) in zip(panels, studies.items(), strict=True):
        mine = frame[frame["study"] == name].set_index("algorithm")
        reached = mine["rounds_least"][np.isfinite(mine["rounds_least"])]
        end = 1.3 * study.rounds
        for place, label in enumerate(labels):
            row, budget = mine.loc[label], study.budget(label)
            colour = "#D55E00" if label.endswith("(ours)") else "#0072B2"
            if row["reached"]:
                most = row["rounds_most"] if np.isfinite(row["rounds_most"]) else budget
                panel.plot([row["rounds_least"], most], [place, place], color=colour, linewidth=1.4)
            if np.isfinite(row["rounds"]):  # hollow: not on all seeds
                inside = colour if row["reached"] == row["seeds"] else "white"
                panel.plot(row["rounds"], place, marker="o", color=colour, markerfacecolor=inside)
            if row["reached"] < row["seeds"]:  # where the runs ended
                panel.plot(budget, place, marker="x", color=colour if row["reached"] else "grey")
        panel.set(
            xscale="log", xlim=(0.7 * reached.min() if len(reached) else 1, end), xlabel="rounds", title=goal(study)
        )
        # 10, 20, 50, 100, ...: matplotlib's own labels overlap where an axis spans little more than a decade
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.title.set_fontsize(10)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].invert_yaxis()
    figure.suptitle(
        "Rounds to the goal: median and range over seeds; hollow: not on all seeds; a cross: where runs ended without it",
        fontsize=11,
    )
    figure.savefig(path, dpi=120)
    return path
