"""What a results folder holds, read for looking at: whatever is missing or cut is noted, and no reason to stop."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from pathlib import Path

import pandas

from ..errors import InputError, check
from ..results.folder import CANDIDATES, CHECKPOINT, CONFIG, HISTORY, OUTCOME, RESULT, RUNS, configuration
from ..results.report import FIXED

_WORDS = ("algorithm", "stopped")  # columns of a history that are no numbers
_NUMBERS = [name for name in FIXED if name not in ("algorithm", "seed")]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a folder.

    Attributes:
        algorithm, seed: which.
        place: its own folder; None where nothing but its rows is left.
        rows: of its history, with the columns algorithm and seed first; none where it has not written any.
        head: what result.json says; {} without one.
        outcome: what outcome.json says; {} without one.
    """

    algorithm: str
    seed: int
    place: Path | None
    rows: pandas.DataFrame
    head: dict = dataclasses.field(default_factory=dict)
    outcome: dict = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def totals(self) -> dict:
        """What its checkpoint says of the run so far; {} where there is none that can be read."""
        try:
            assert self.place is not None
            with (self.place / CHECKPOINT).open("rb") as file:
                totals = json.loads(file.readline())["totals"]
            return totals if isinstance(totals, dict) else {}
        except Exception:  # whatever is wrong with it
            return {}

    def last(self, column: str) -> float:
        """The last value of a column; NaN where there is none."""
        values = self.rows[column].dropna() if column in self.rows else pandas.Series(dtype=float)
        return float(values.iloc[-1]) if len(values) else float("nan")

    def file(self, name: str) -> Path | None:
        """One of its files, where it is there."""
        file = None if self.place is None else self.place / name
        return file if file is not None and file.is_file() else None


@dataclasses.dataclass(frozen=True)
class Found:
    """A folder.

    Attributes:
        folder: it.
        config: what config.json says; {} without one.
        runs: in it.
        missing: sentences about what is missing, cut or cannot be read.
    """

    folder: Path
    config: dict
    runs: tuple[Run, ...]
    missing: tuple[str, ...]

    @functools.cached_property
    def frame(self) -> pandas.DataFrame:
        """The rows of all runs."""
        rows = [run.rows for run in self.runs if len(run.rows)]
        return pandas.concat(rows, ignore_index=True) if rows else pandas.DataFrame(columns=pandas.Index(FIXED))

    @functools.cached_property
    def algorithms(self) -> dict[str, list[Run]]:
        """The runs of each algorithm."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.algorithm, []).append(run)
        return found

    @property
    def tuned(self) -> bool:
        """Whether it is of a race."""
        return isinstance(self.config.get("tune"), dict) or (self.folder / CANDIDATES).is_file()

    @property
    def what(self) -> str:
        """The task's or the application's name; the folder's where nothing says it."""
        said = self.config.get("task") or self.config.get("app")
        return said if isinstance(said, str) else self.folder.resolve().name

    @property
    def steps(self) -> dict[str, str]:
        """Where each algorithm's step sizes come from."""
        told = self.config.get("steps")
        return {str(name): str(whence) for name, whence in told.items()} if isinstance(told, dict) else {}


def look(folder: Path) -> Found:
    """Read a folder.

    Raises:
        InputError: there is none, or nothing of ours in it.
    """
    check(folder.is_dir(), f"there is no folder {folder}.")
    missing: list[str] = []
    config = _config(folder, missing)
    places = sorted(path for path in (folder / RUNS).glob("*") if path.is_dir())
    runs = [_run(folder, place, config, missing) for place in places]
    runs += _left(folder, config, [(run.algorithm, run.seed) for run in runs], missing)
    known = bool(config) or any(len(run.rows) or run.head or run.outcome for run in runs)
    check(known, f"{folder} holds no results of ours: name the --out folder of a run, a comparison or a race.")
    runs = [run for run in runs if run.place is None or len(run.rows) or run.head or run.outcome or _begun(run.place)]
    if not config:
        missing.insert(0, f"{CONFIG}: settings are not told.")
    missing += _not_begun(config, runs)
    missing += [f"{_where(folder, run.place)}{RESULT}: no protocol." for run in runs if run.place and not run.head]
    return Found(folder, config, tuple(_sorted(config, runs)), tuple(missing))


def _begun(place: Path) -> bool:
    return (place / HISTORY).is_file() or (place / CHECKPOINT).is_file()


def _config(folder: Path, missing: list[str]) -> dict:
    try:
        config = configuration(folder)
    except (InputError, OSError):
        missing.append(f"{CONFIG} cannot be read: settings are not told.")
        return {}
    return dict(config) if {"task", "app", "algorithms"} & set(config) and "seeds" in config else {}


def _run(folder: Path, place: Path, config: dict, missing: list[str]) -> Run:
    """A run in a folder of its own, called NAME-SEED."""
    name, _, number = place.name.rpartition("-")
    rows = _rows(folder, place / HISTORY, missing)
    if rows is not None and {"algorithm", "seed"} <= set(rows.columns) and len(rows):
        name, number = str(rows["algorithm"].iloc[0]), str(int(rows["seed"].iloc[0]))
    seed = int(number) if number.lstrip("-").isdecimal() else 0
    return _of(folder, place, name or place.name, seed, rows, missing)


def _of(folder: Path, place: Path, name: str, seed: int, rows: pandas.DataFrame | None, missing: list[str]) -> Run:
    if rows is None:
        rows = pandas.DataFrame(columns=pandas.Index(FIXED))
    own = rows.drop(columns=["algorithm", "seed"], errors="ignore")
    own.insert(0, "algorithm", name)
    own.insert(1, "seed", seed)
    head, outcome = (_json(folder, place / file, missing) for file in (RESULT, OUTCOME))
    return Run(name, seed, place, own, head if "format" in head else {}, outcome if "status" in outcome else {})


def _left(folder: Path, config: dict, known: list[tuple[str, int]], missing: list[str]) -> list[Run]:
    """Runs of the folder itself: the one of an application or a race, and those of which only rows are left."""
    alone = not known and any((folder / name).is_file() for name in (HISTORY, RESULT, OUTCOME, CHECKPOINT))
    several = known or (folder / HISTORY).is_file()
    rows = _rows(folder, folder / HISTORY, missing if alone else []) if several else None
    if rows is not None and {"algorithm", "seed"} <= set(rows.columns):
        of = {(str(name), int(seed)): own for (name, seed), own in rows.groupby(["algorithm", "seed"], sort=False)}  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType]
        if len(of) != 1 or known or not _single(folder):
            return [Run(*pair, None, own.reset_index(drop=True)) for pair, own in of.items() if pair not in known]
    elif known:
        return []
    if not alone:
        return []
    head = _json(folder, folder / RESULT, [])
    said = head.get("config", {}) if isinstance(head.get("config"), dict) else {}
    names = [*_names(config), str(said.get("algorithm") or folder.resolve().name)]
    seeds = config.get("seeds")
    seed = seeds[0] if isinstance(seeds, list) and seeds and isinstance(seeds[0], int) else 0
    return [_of(folder, folder, names[0], seed, rows, missing)]


def _single(folder: Path) -> bool:
    """Whether a run lies in the folder itself."""
    return any((folder / name).is_file() for name in (RESULT, OUTCOME, CHECKPOINT))


def _names(config: dict) -> list[str]:
    told = config.get("steps") or config.get("algorithms")
    return [str(name) for name in told] if isinstance(told, dict) else []


def _not_begun(config: dict, runs: list[Run]) -> list[str]:
    seeds, there = config.get("seeds"), {(run.algorithm, run.seed) for run in runs}
    if not isinstance(seeds, list) or "tune" in config:
        return []
    gone = [f"{name}, seed {seed}" for name in _names(config) for seed in seeds if (name, seed) not in there]
    more = f" and {len(gone) - 6:,} more" if len(gone) > 6 else ""
    return [f"not begun: {'; '.join(gone[:6])}{more}."] if gone else []


def _sorted(config: dict, runs: list[Run]) -> list[Run]:
    names = _names(config)
    rank = lambda run: names.index(run.algorithm) if run.algorithm in names else len(names)
    return sorted(runs, key=lambda run: (rank(run), run.algorithm if rank(run) == len(names) else "", run.seed))


def _json(folder: Path, file: Path, missing: list[str]) -> dict:
    if not file.is_file():
        return {}
    try:
        told = json.loads(file.read_text())
    except (OSError, ValueError):
        told = None
    if not isinstance(told, dict):
        missing.append(f"{_where(folder, file)} cannot be read: it is cut, or none of ours.")
        return {}
    return told


def _rows(folder: Path, file: Path, missing: list[str]) -> pandas.DataFrame | None:
    """The rows of a history; None where there is none, or it is none of ours."""
    where = _where(folder, file)
    if not file.is_file():
        missing.append(f"{where}: no rows.")
        return None
    try:
        text = file.read_text(errors="replace")
        whole, _, cut = text.rpartition("\n")
        if cut:
            missing.append(f"{where}: its last row is cut, and left out.")
        frame = pandas.read_csv(io.StringIO(whole + "\n"), low_memory=False)
    except Exception as error:  # whatever pandas finds wrong with it
        missing.append(f"{where} cannot be read ({type(error).__name__}).")
        return None
    lacking = [name for name in _NUMBERS if name not in frame.columns]
    if lacking:
        missing.append(f"{where} has no column {', '.join(lacking)}: it is no history of ours.")
        return None
    words = [name for name in frame.columns if name in _WORDS]
    numbers = frame.drop(columns=words).apply(pandas.to_numeric, errors="coerce")
    frame = pandas.concat([frame[words].astype("string").astype(object), numbers], axis=1)[list(frame.columns)]
    needed = [*_NUMBERS, *(name for name in ("algorithm", "seed") if name in frame.columns)]
    good = frame.dropna(subset=needed)
    if len(good) < len(frame):
        missing.append(f"{where}: {len(frame) - len(good):,} rows without rounds, bytes or seconds are left out.")
    return good.reset_index(drop=True)


def _where(folder: Path, path: Path) -> str:
    """A file as it is called within the folder; a folder with a slash."""
    name = str(path.relative_to(folder))
    return "" if name == "." else name + "/" * path.is_dir()
