"""Rounds to a stationary point, method by method, on one grid of steps and turns: what each idea is worth.

Every method gets the same grid: N = T in `TURNS` (Lockstep has no N), and for each the steps of `problems.grid`. Rounds in
which one local step adds nothing are left out (`skip_idle_rounds`), for all alike; the other column counts them too.

All clients, exact gradients: rounds until |grad Phi|^2 < 1e-8 for the first time. Cohorts: the replies of 4 of 40 clients
are noisy, and with constant steps |grad Phi|^2 falls to a floor. There a budget of rounds is used up; a level counts as
reached where the mean of |grad Phi|^2 over a hundredth of the budget is below it, in the middle one of three runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import pandas

from fedbilevel import AggITD, Algorithm, FedNest, Lockstep, protocol

from ..kinds import JSON, Setting
from . import common, problems, runner

LEVEL, BUDGET, RANDOM_BUDGET, TURNS = 1e-8, 100_000, 20_000, (1, 2, 5, 10, 20, 40, 60, 80)
CLIENTS, COHORT, SEEDS, BLOCKS = 40, 4, 3, 100
COHORT_BUDGET, COHORT_TURNS = 10_000, (1, 5, 20)
PROBLEMS: dict[str, Callable[..., runner.Setup]] = {"quadratic": problems.quadratic, "ridge": problems.ridge}
BASELINE = "FedNest, full, T = N"
FULL: dict[str, Setting] = {"truncation": "full"}
WARM: dict[str, Setting] = {**FULL, "warm_start_v": True}


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table: a class and its options; `single`: FedNest with one turn of the lower loop, not N."""

    kind: type[Algorithm]
    options: dict[str, Setting]
    single: bool = False

    def turns(self, wanted: tuple[int, ...]) -> tuple[int, ...]:
        """The N to try."""
        return wanted[:1] if self.kind is Lockstep else wanted

    @property
    def random(self) -> bool:
        """Whether the server draws where the series ends; with constant steps that is noise."""
        return self.options.get("truncation") == "uniform"

    def build(self, N: int, local_steps: int, skip: bool = True) -> Algorithm:
        """The algorithm with N turns; FedNest with N terms, and N turns or one."""
        if self.kind is Lockstep:
            return Lockstep(local_steps=local_steps)
        settings = {"local_steps": local_steps, "skip_idle_rounds": skip, **self.options}
        if self.kind is FedNest:
            return FedNest(inner_rounds=1 if self.single else N, neumann_terms=N, **settings)
        return AggITD(inner_rounds=N, **settings)


METHODS = {
    "FedNest, random N', T = N": Method(FedNest, {"truncation": "uniform"}),
    BASELINE: Method(FedNest, FULL),
    "FedNest, full, T = 1": Method(FedNest, FULL, single=True),
    "AggITD, random Q": Method(AggITD, {"truncation": "uniform"}),
    "AggITD, full (ours)": Method(AggITD, FULL),
    "AggITD, full, warm v (ours)": Method(AggITD, WARM),
    "AggITD, full, warm v, one round (ours)": Method(AggITD, {**WARM, "one_round": True}),
    "Lockstep (ours)": Method(Lockstep, {}),
}
OURS = ("AggITD, full, warm v (ours)", "AggITD, full, warm v, one round (ours)", "Lockstep (ours)")
MANY_STEPS = (BASELINE, "AggITD, full (ours)", *OURS)


def rounds_table(folder: Path, quick: bool = False, progress: common.Progress = lambda text: None) -> list[Path]:
    """The study; leaves rounds-table.md and .png, rounds-table-cohorts.md, and of each a table for every problem."""
    budget, turns, names = (2_000, (2,), ("ridge",)) if quick else (BUDGET, TURNS, tuple(PROBLEMS))
    methods = {1: (BASELINE, *OURS), 5: OURS[-1:]} if quick else {1: tuple(METHODS), 5: MANY_STEPS}
    settings = {"methods": {str(steps): found for steps, found in methods.items()}, "level": LEVEL, "N": turns}
    settings |= {"budget": budget, "random_budget": RANDOM_BUDGET, "stalled": runner.STALLED}
    frame = _tables(
        folder, "rounds-table", names, settings, lambda name: _problem(name, methods, budget, turns, progress)
    )
    files = [*_csv(folder, "rounds-table", names), _markdown(folder, frame, budget), _figure(folder, frame)]
    return [*files, *_cohorts(folder, quick, names, progress)]


def _tables(
    folder: Path,
    study: str,
    names: Sequence[str],
    settings: Mapping[str, JSON],
    rows: Callable[[str], Iterable[common.Row]],
) -> pandas.DataFrame:
    """The problems' tables one below the other, each kept for itself: an interrupted study goes on with the next one."""

    def made(name: str) -> list[common.Row]:
        with jax.enable_x64(True):
            return list(rows(name))

    settings = {**settings, "inner": problems.INNER, "outer": problems.OUTER}
    frames = [common.table(folder, f"{study}-{name}", settings, lambda name=name: made(name)) for name in names]
    return pandas.concat(frames, ignore_index=True)


def _csv(folder: Path, study: str, names: Sequence[str]) -> list[Path]:
    return [folder / f"{study}-{name}.csv" for name in names]


# All clients, exact gradients ------------------------------------------------------------------------------------------


def _problem(
    name: str, methods: Mapping[int, Sequence[str]], budget: int, turns: tuple[int, ...], progress: common.Progress
) -> Iterator[common.Row]:
    setup = PROBLEMS[name]()
    for local_steps, labels in methods.items():
        for label in labels:
            method, best, missed, last = METHODS[label], None, 0, np.inf
            for N in method.turns(turns):
                progress(f"rounds-table: {name}, {local_steps} local steps, {label}, N = {N}")
                lanes = problems.grid(setup, local_steps)
                algorithm = method.build(N, local_steps)
                most = (min(budget, RANDOM_BUDGET) if method.random else budget) if best is None else best["rounds"]
                race = runner.race(setup, algorithm, LEVEL, most, **lanes)
                last = min(last, race.lowest)
                missed += 1
                if race.lane is not None and (best is None or race.rounds < best["rounds"]):
                    steps = {step: values[race.lane] for step, values in lanes.items()}
                    idle = _rounds_an_iteration(setup, method.build(N, local_steps, skip=False))
                    literal = np.nan if idle is None else idle * race.iterations
                    best, missed = {"rounds": race.rounds, "all_rounds": literal, "N": N, **steps}, 0
                if best is not None and missed == 2:  # two larger N in a row took longer
                    break
            never = {"rounds": np.inf, "all_rounds": np.inf, "N": np.nan}
            yield {"problem": name, "local_steps": local_steps, "method": label, **(best or never), "lowest": last}


def _rounds_an_iteration(setup: runner.Setup, algorithm: Algorithm) -> int | None:
    """None if it is drawn while running."""
    found = protocol(algorithm, setup.problem, setup.data, setup.x, setup.y)
    return found.rounds_most if found.rounds == found.rounds_most else None


def _markdown(folder: Path, frame: pandas.DataFrame, budget: int) -> Path:
    names, rows = list(frame["problem"].unique()), []
    for (local_steps, label), at in frame.groupby(["local_steps", "method"], sort=False):
        cells = [str(local_steps), str(label)]
        for name in names:
            row = at[at["problem"] == name].iloc[0]
            reached = np.isfinite(row["rounds"])
            cells += [
                common.count(row["rounds"]),
                _turns(str(label), f"{row['N']:.0f}") if reached else "-",
                _ratio(frame, row),
            ]
            cells += [common.count(row["all_rounds"]) if reached else f"lowest {row['lowest']:.1e}"]
        rows.append(cells)
    head = ["local steps", "method"]
    for name in names:
        head += [f"{name}: rounds", "N", "FedNest's over these", "with idle rounds"]
    text = (
        f"Rounds to |grad Phi|^2 < {LEVEL:g}, all clients, exact gradients; one grid of steps. Given up after {budget:,} "
        f"rounds ({min(budget, RANDOM_BUDGET):,} with a random number of terms), or where 1,000 iterations bring nothing."
    )
    return common.markdown(folder / "rounds-table.md", text, head, rows)


def _turns(label: str, N: str) -> str:
    """N in a table's cell; there is none in one round."""
    return "-" if METHODS[label].kind is Lockstep else N


def _ratio(frame: pandas.DataFrame, row: pandas.Series) -> str:
    """Rounds of the baseline with one local step over this row's."""
    where = (frame["problem"] == row["problem"]) & (frame["method"] == BASELINE) & (frame["local_steps"] == 1)
    baseline = frame[where]["rounds"].item()
    return f"{baseline / row['rounds']:.3g}" if np.isfinite(row["rounds"]) and np.isfinite(baseline) else "-"


def _figure(folder: Path, frame: pandas.DataFrame) -> Path:
    names = list(frame["problem"].unique())
    figure, axes = common.panels(1, len(names), (5.2 * len(names) + 3, 5), sharey=True)
    bars = frame[["local_steps", "method"]].drop_duplicates()
    for axis, name in zip(axes[0], names, strict=True):
        at = frame[frame["problem"] == name].merge(bars)
        never = ~np.isfinite(at["rounds"])
        reached = at["rounds"].where(~never)
        end = 2 * (reached.max() if reached.notna().any() else 10)
        for local_steps, look in ((1, {"color": "#0072B2"}), (5, {"color": "#E69F00", "hatch": "//"})):
            part = at["local_steps"] == local_steps
            label = "one local step" if local_steps == 1 else f"{local_steps} local steps"
            axis.barh(np.flatnonzero(part), reached[part], **look, edgecolor="white", label=label)
        for place, value in enumerate(reached):
            text, where = ("never", end / 1e3) if np.isnan(value) else (f" {value:,.0f}", value)
            axis.text(where, place, text, va="center", fontsize=8)
        axis.set(title=name, xscale="log", xlim=(end / 2e3, 3 * end))
        axis.set_xlabel(f"rounds to $|\\nabla\\Phi|^2$ < {LEVEL:g}")
        axis.set_yticks(range(len(at)), at["method"])
    axes[0, 0].invert_yaxis()
    common.legend(figure, 2)
    return common.save(figure, folder / "rounds-table.png")


# Cohorts ---------------------------------------------------------------------------------------------------------------


def _cohorts(folder: Path, quick: bool, names: Sequence[str], progress: common.Progress) -> list[Path]:
    budget, turns, seeds = (1_000, (2,), 1) if quick else (COHORT_BUDGET, COHORT_TURNS, SEEDS)
    methods = (BASELINE, *OURS[-1:]) if quick else tuple(METHODS)
    settings = {"budget": budget, "N": turns, "clients": CLIENTS, "cohort": COHORT, "seeds": seeds, "methods": methods}
    study, rows = "rounds-table-cohorts", lambda name: _noisy(name, budget, turns, seeds, methods, progress)
    frame = _tables(folder, study, names, settings, rows)
    cells = []
    for label, at in frame.groupby("method", sort=False):  # pyright: ignore[reportGeneralTypeIssues]
        line = [str(label)]
        for name in names:
            row = at[at["problem"] == name].iloc[0]
            numbers = [_turns(str(label), str(row[column])) for column in ("N", "N_rounds")]
            line += [common.number(row["floor"], 2), numbers[0], common.count(row["rounds"]), numbers[1]]
        cells.append(line)
    head = ["method"]
    for name in names:
        head += [f"{name}: abs(grad Phi)^2 at the end", "N", "rounds to FedNest's", "N"]
    text = (
        f"{COHORT} of {CLIENTS} clients an exchange, one local step, {budget:,} rounds; one grid of steps. "
        "The best mean of |grad Phi|^2 over the last tenth, and the rounds to where FedNest (full, T = N) ends."
    )
    path = common.markdown(folder / "rounds-table-cohorts.md", text, head, cells)
    return [*_csv(folder, study, names), path]


def _noisy(
    name: str, budget: int, turns: tuple[int, ...], seeds: int, methods: Sequence[str], progress: common.Progress
) -> Iterator[common.Row]:
    setup = PROBLEMS[name](CLIENTS, cohort=COHORT)
    lanes = problems.grid(setup, 1)
    found = {}
    for label in methods:
        for N in METHODS[label].turns(turns):
            progress(f"rounds-table, cohorts: {name}, {label}, N = {N}")
            algorithm = METHODS[label].build(N, 1)
            iterations = int(budget / protocol(algorithm, setup.problem, setup.data, setup.x, setup.y).rounds)
            seeded = [dataclasses.replace(setup, key=jax.random.key(seed)) for seed in range(seeds)]
            runs = [runner.curves(one, algorithm, iterations, BLOCKS, None, **lanes) for one in seeded]
            found[label, N] = tuple(np.stack(part) for part in zip(*runs, strict=True))
    ends = {place: _median(values[:, :, -BLOCKS // 10 :].mean(-1)) for place, (_, values) in found.items()}
    level = min(np.nanmin(ends[place]) for place in ends if place[0] == BASELINE)
    for label in methods:
        tried = METHODS[label].turns(turns)
        floors = {N: np.nanmin(ends[label, N]) for N in tried}
        times = {N: np.min(_median(_first(found[label, N], level))) for N in tried}
        end, soon = min(floors, key=floors.__getitem__), min(times, key=times.__getitem__)
        yield {
            "problem": name, "method": label, "floor": floors[end], "N": end, "rounds": times[soon],
            "N_rounds": soon if np.isfinite(times[soon]) else "-", "level": level,
        }  # fmt: skip


def _median(values: np.ndarray) -> np.ndarray:
    """Over the seeds; what blew up counts as infinite."""
    return np.median(np.where(np.isfinite(values), values, np.inf), axis=0)


def _first(runs: tuple[np.ndarray, np.ndarray], level: float) -> np.ndarray:
    """(seeds, lanes) rounds at the end of the first block whose mean is at the level, of (rounds, values)."""
    rounds, values = runs
    reached = values <= level
    first = np.take_along_axis(rounds, np.argmax(reached, axis=-1), axis=-1)
    return np.where(reached.any(-1), first, np.inf)
