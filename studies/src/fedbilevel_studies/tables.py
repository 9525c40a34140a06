"""Tables and figures of a study: rounds, bytes and oracle calls to levels, paired ratios, settings, curves, shares."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedbilevel.results import direction, first_reached, pipe_table, running_median

from .kinds import Cell, Look, Text
from .search import as_number
from .study import Study

# Okabe & Ito's palette and three of Paul Tol's: told apart by colour-blind readers; lines differ in dashes too
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#882255", "#999933", "#332288",
)  # fmt: skip
DASHES = (
    "-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 3)), (0, (2, 2)), (0, (6, 2, 1, 2)),
    (0, (1, 3)),
)  # fmt: skip
AXES = {
    "rounds": "communication rounds",
    "megabytes_up": "payload sent by one client place, MB",
    "oracle_calls": "oracle calls of one client place",
    "seconds": "seconds of computation",
}


def collect(study: Study, folder: Path) -> pandas.DataFrame:
    """The histories of all runs of a study, with the columns kind, megabytes_up and oracle_calls."""
    frames = []
    for seed in study.seeds:
        for contender in study.contenders:
            place = folder / "runs" / f"{contender.label}-{seed}"
            done = json.loads((place / "done.json").read_text())
            frame = pandas.read_csv(place / "history.csv")
            cohort = 1 if contender.kind == "pooled" else study.clients_an_exchange
            frames.append(frame.assign(
                kind=contender.kind, megabytes_up=frame["bytes_up"] / cohort / 1e6,
                oracle_calls=frame["iteration"] * done["oracle_calls"], failure=done["failure"],
            ))  # fmt: skip
    return pandas.concat(frames, ignore_index=True)


def write(study: Study, folder: Path) -> list[Path]:
    """All tables and figures of a finished study; returns the files."""
    frame = collect(study, folder)
    rivals = frame[frame["kind"] != "pooled"]  # whose bytes and rounds mean something
    rivals.drop(columns=["kind", "failure"]).to_csv(folder / "history.csv", index=False)
    levels = levels_table(study, frame, study.levels)
    files = [folder / "history.csv", *write_table(folder, "levels", levels, _levels_text(study, levels))]
    at_goal = levels_table(study, frame, (study.goal,))
    files += write_table(folder, "spent", at_goal, _spent_text(at_goal))
    files += write_table(folder, "settings", *settings_table(study, folder))
    if study.pairs:
        ratios = ratios_table(study, frame)
        files += write_table(folder, "ratios", ratios, _ratios_text(ratios))
    shares = [file for file in sorted(folder.glob("runs/*/shares.csv")) if file.stat().st_size]
    measured = [table for table in map(pandas.read_csv, shares) if len(table)]  # none where a run blew up at once
    parts = pandas.concat(measured, ignore_index=True) if measured else None
    if parts is not None:
        parts.to_csv(folder / "shares.csv", index=False)
        files.append(folder / "shares.csv")
    files += [draw(study, folder / f"{metric}.png", frame, metric, parts) for metric in _metrics(study, frame)]
    return files


def levels_table(study: Study, frame: pandas.DataFrame, levels: tuple[float, ...]) -> pandas.DataFrame:
    """A row per contender, level and axis: median, least and most over seeds of what it took; infinite for never."""
    rows = []
    sign = direction(study.metric)
    for label, runs in frame.groupby("algorithm", sort=False):
        if (runs["kind"] == "pooled").any():
            continue
        for level in levels:
            found = [_at_level(run, study.metric, sign, level) for _, run in runs.groupby("seed")]
            row: dict[str, Cell] = {"algorithm": str(label), "level": level, "seeds": len(found)}
            row["reached"] = sum(f is not None for f in found)
            for axis in AXES:
                values = [np.inf if f is None else float(f[axis]) for f in found]
                row |= {axis: float(np.median(values)), f"{axis}_least": min(values), f"{axis}_most": max(values)}
            rows.append(row)
    return pandas.DataFrame(rows)


def _at_level(run: pandas.DataFrame, metric: str, sign: int, level: float) -> pandas.Series | None:
    run = run.sort_values("iteration")
    at = first_reached(sign * run[metric].to_numpy(), sign * level)
    return None if at is None else run.iloc[at]


def ratios_table(study: Study, frame: pandas.DataFrame) -> pandas.DataFrame:
    """A row per pair and level: the ratio of rounds, one to other, seed by seed: median, least, most."""
    rows, sign = [], direction(study.metric)
    of = lambda label: dict(list(frame[frame["algorithm"] == label].groupby("seed")))
    for one, other in study.pairs:
        runs, others = of(one), of(other)
        for level in study.levels:
            ratios = []
            for seed in study.seeds:
                a, b = (_at_level(r[seed], study.metric, sign, level) for r in (runs, others))
                if a is None and b is None:
                    continue
                ratios.append(np.inf if a is None else 0.0 if b is None else a["rounds"] / b["rounds"])
            if ratios:
                rows.append({
                    "one": one, "other": other, "level": level, "seeds": len(ratios),
                    "ratio": float(np.median(ratios)), "least": min(ratios), "most": max(ratios),
                })  # fmt: skip
    return pandas.DataFrame(rows)


def level_name(study: Study, level: float) -> str:
    return f"{100 * level:g} %" if study.metric.endswith("accuracy") else f"{level:g}"


def never(study: Study, label: str) -> str:
    """What to say of a level that no run of a contender reached: of a shorter run, how long it was."""
    budget = study.budget(label)
    return "never" if budget == study.rounds else f"not in {budget}"


def number(value: float) -> str:
    """A cell's number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _levels_text(study: Study, table: pandas.DataFrame) -> Text:
    head = ["rounds to", *[level_name(study, level) for level in study.levels]]
    rows = []
    for label, mine in table.groupby("algorithm", sort=False):
        cells = []
        for _, row in mine.iterrows():
            if not np.isfinite(row["rounds"]):
                cells.append(
                    never(study, str(label)) if row["reached"] == 0 else f"{row['reached']} of {row['seeds']} seeds"
                )
            else:
                most = f"{row['rounds_most']:.0f}" if np.isfinite(row["rounds_most"]) else "never"
                cells.append(f"{row['rounds']:.0f} ({row['rounds_least']:.0f}-{most})")
        rows.append([str(label), *cells])
    return head, rows


def _spent_text(table: pandas.DataFrame) -> Text:
    """What reaching the goal took, on every axis; medians over seeds."""
    head = ["algorithm", "rounds", "MB sent by one client place", "oracle calls of one client place", "seconds"]
    cell = lambda value: number(value) if np.isfinite(value) else "never"
    return head, [[str(row["algorithm"]), *(cell(row[axis]) for axis in AXES)] for _, row in table.iterrows()]


def settings_table(study: Study, folder: Path) -> tuple[pandas.DataFrame, Text]:
    """What the grid chose for every contender, as a table and in words.

    (e): at an edge of the values that it tried (of a grid that went on from its best point, only the folder where it ran
    knows them); (b): beyond those that it began with.
    """
    file = folder / "grid.csv"
    went_on = pandas.read_csv(file) if study.beyond and file.is_file() else None
    chosen = tomllib.loads((folder / "settings.toml").read_text())
    names = list(dict.fromkeys(name for found in chosen.values() for name in found))
    table = pandas.DataFrame([{"algorithm": label, **found} for label, found in chosen.items()])
    rows = []
    for contender in study.contenders:
        tried = study.candidates(contender)
        cells = []
        for name in names:
            values, mine = (
                sorted({as_number(point[name]) for point in tried if name in point}),
                chosen[contender.label].get(name),
            )
            if mine is None:
                cells.append("-")
                continue
            beyond = not values[0] <= mine <= values[-1]
            if went_on is not None:
                values = sorted(set(went_on.loc[went_on["label"] == contender.label, name]))
            edge = len(values) > 2 and (mine <= values[0] or mine >= values[-1])
            known = went_on is not None or not study.beyond
            cells.append(f"{mine:g}" + (" (b)" if beyond else "") + (" (e)" if edge and known else ""))
        rows.append([contender.label, *cells])
    return table, (["algorithm", *(name.replace("_", " ") for name in names)], rows)


def _ratios_text(table: pandas.DataFrame) -> Text:
    head = ["one", "other", "level", "seeds", "ratio of rounds, median (range)"]
    number = lambda value: "never" if np.isinf(value) else f"{value:.2f}" if value > 0 else "other never"
    text = lambda row: f"{number(row['ratio'])} ({number(row['least'])}-{number(row['most'])})"
    rows = [
        [row["one"], row["other"], f"{row['level']:g}", str(row["seeds"]), text(row)] for _, row in table.iterrows()
    ]
    return head, rows


def write_table(folder: Path, name: str, table: pandas.DataFrame, text: Text) -> list[Path]:
    """A table as CSV in full, and its cells in words as Markdown and LaTeX."""
    head, rows = text
    files = [folder / f"{name}.csv", folder / f"{name}.md", folder / f"{name}.tex"]
    table.to_csv(files[0], index=False)
    files[1].write_text(pipe_table(head, rows))
    files[2].write_text(latex(head, rows))
    return files


def latex(head: list[str], rows: list[list[str]]) -> str:
    """Text cells as a LaTeX tabular."""
    table = pandas.DataFrame(rows, columns=pandas.Index(head), dtype=str).style.hide(axis="index")
    lines = [{"selector": name, "props": ":hline;"} for name in ("toprule", "midrule", "bottomrule")]
    styled = table.format(escape="latex").format_index(escape="latex", axis="columns").set_table_styles(lines)  # pyright: ignore
    return styled.to_latex(column_format="l" + "r" * (len(head) - 1))


def _metrics(study: Study, frame: pandas.DataFrame) -> list[str]:
    wanted = [study.metric, "balanced_accuracy", "validation_loss", "test_loss"]
    return [name for i, name in enumerate(wanted) if name in frame.columns and name not in wanted[:i]]


def draw(
    study: Study, path: Path, frame: pandas.DataFrame, metric: str, shares: pandas.DataFrame | None = None
) -> Path:
    """A metric against rounds, bytes, oracle calls and seconds, and the share of the implicit part; medians and ranges."""
    figure = Figure(figsize=(12.5, 7.2), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    style = {
        c.label: {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[(i + i // len(COLOURS)) % len(DASHES)]}
        for i, c in enumerate(study.contenders)
    }
    ranges = len(study.contenders) <= len(COLOURS)  # of more, nobody could tell them apart
    low, high = _limits(frame, metric)
    for panel, (axis, label) in zip(panels, AXES.items(), strict=False):
        for contender in study.contenders:
            runs = frame[frame["algorithm"] == contender.label]
            if contender.kind == "pooled":
                end = np.median([running_median(run[metric])[-1] for _, run in runs.groupby("seed")])
                panel.axhline(end, linewidth=1.2, **style[contender.label])
                continue
            grid, middle, least, most = _band(runs, axis, metric)
            panel.plot(grid, middle, linewidth=1.6, **style[contender.label])
            if ranges:
                panel.fill_between(grid, least, most, color=style[contender.label]["color"], alpha=0.12, linewidth=0)
        panel.set(xlabel=label, ylabel=metric.replace("_", " "), ylim=(low, high))
        panel.set_xlim(left=0)
        panel.locator_params(axis="x", nbins=5)
        panel.grid(alpha=0.3)
    _draw_shares(panels[4], shares, style)
    panels[5].axis("off")
    words = panels[5 if shares is not None else 4]
    for contender in study.contenders:
        note = {"rival": "", "frozen": " (x left alone)", "pooled": " (all data at one client; its end)"}[
            contender.kind
        ]
        words.plot([], [], linewidth=1.6, label=contender.label + note, **style[contender.label])
    legend = words.legend(loc="center left", frameon=False, ncols=1 if shares is not None or ranges else 2)
    legend.set_in_layout(False)  # it may reach over the empty place beside it, and moves no panel
    middle = "median and range" if ranges else "median"
    seeds = f"{middle} over {len(study.seeds)} seeds" if len(study.seeds) > 1 else "one seed"
    figure.suptitle(
        f"{study.summary}\n{metric.replace('_', ' ')}: running median of five evaluations, {seeds}", fontsize=11
    )
    figure.savefig(path, dpi=110)
    return path


def _limits(frame: pandas.DataFrame, metric: str) -> tuple[float, float]:
    """Room for all running medians; of an accuracy at most the upper half, where it tells."""
    medians = np.concatenate([running_median(run[metric]) for _, run in frame.groupby(["algorithm", "seed"])])
    low, high = np.nanmin(medians), np.nanquantile(medians, 0.99 if not metric.endswith("accuracy") else 1.0)
    if metric.endswith("accuracy"):
        low = max(low, 2 * np.nanmedian(medians) - 1.0, 0.0)
    pad = 0.04 * (high - low) or 0.01
    return float(low - pad), float(high + pad)


def _band(
    runs: pandas.DataFrame, axis: str, metric: str, count: int = 300
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(grid, median, least, most) over seeds of the running median; a run that blew up stays where it ended, or at 0 %."""
    curves = []
    for _, run in runs.groupby("seed"):
        run = run.sort_values("iteration")
        medians = running_median(run[metric])
        if metric.endswith("accuracy") and run["failure"].notna().any():
            medians[-1] = 0.0
        curves.append((run[axis].to_numpy()[len(run) - len(medians) :], medians))
    first, last = max(x[0] for x, _ in curves), max(x[-1] for x, _ in curves)
    grid = np.linspace(first, last, count)
    values = np.stack([np.interp(grid, x, v) for x, v in curves])
    return grid, np.median(values, axis=0), values.min(axis=0), values.max(axis=0)


def _draw_shares(panel: Axes, shares: pandas.DataFrame | None, style: Mapping[str, Look]) -> None:
    if shares is None:
        panel.axis("off")
        return
    for label, mine in shares.groupby("algorithm", sort=False):
        curves = [(run["rounds"].to_numpy(), 100 * run["share"].to_numpy()) for _, run in mine.groupby("seed")]
        grid = np.linspace(0, min(x[-1] for x, _ in curves), 100)
        middle = np.median([np.interp(grid, x, v) for x, v in curves], axis=0)
        panel.plot(grid, middle, linewidth=1.6, **style[str(label)])
    panel.set(xlabel="communication rounds", ylabel="implicit part of the hypergradient, %", ylim=(-3, 103))
    panel.set_xlim(left=0)
    panel.grid(alpha=0.3)
