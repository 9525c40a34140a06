"""`tune` on a plan's source, and what it leaves in a folder: that of a run, and candidates.csv beside it."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax

from ..algorithm import Algorithm
from ..best import Goal
from ..callbacks import Callback, Progress
from ..callbacks.base import Running
from ..callbacks.listeners import listed
from ..cohorts import check_cohort
from ..compare import Plan, describe
from ..component import title_of
from ..engines.base import Engine
from ..errors import RunError, check, unknown_name
from ..given import JSON
from ..metrics import validation_loss
from ..race.heats import Candidate
from ..result import save_arrays, save_best
from ..results.folder import BEST, CANDIDATES, CHECKPOINT, VARIABLES, opened
from ..results.kept import ended, figures_of, keep, tell, went_on
from ..tables.prepared import Prepared
from ..tasks import Task
from .entrants import in_words
from .tuning import Tuned, tune

NAME = "tune"  # what its one curve is called
OUTER_LOSS = validation_loss.__name__  # what is judged where nothing else is named


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What is tuned, and how.

    Attributes:
        plan: source, seed, rounds, engine and the rest; its algorithms do not count.
        task: of the plan's first seed.
        wanted: by which metric candidates are judged; None: the outer loss.
        algorithms: name -> candidate; None: those of `tune`.
        candidates, batch_size, max_bytes: as `tune` takes them.
        network: the engine, where it is none of the plan's.
    """

    plan: Plan
    task: Task
    wanted: Goal | None = None
    algorithms: Mapping[str, Algorithm] | None = None
    candidates: int | None = None
    batch_size: int | None = None
    max_bytes: int | None = None
    network: Engine | None = None

    def __post_init__(self):
        if self.wanted is not None:
            known = self.task.metrics
            check(known, f"{self.task.name} has no metrics: leave the metric out, and the outer loss is judged.")
            if self.wanted.metric not in known:
                raise unknown_name("metric", self.wanted.metric, known)

    @property
    def name(self) -> str:
        """What it is called while it runs."""
        return f"{NAME} {self.plan.source.name}"

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self.plan.build_engine() if self.network is None else self.network

    @property
    def prepared(self) -> Prepared | None:
        """How tables became its rows, if they did."""
        return self.task.data.prepared

    def run(self, *, callbacks: Sequence[Callback] = (), resume: str | os.PathLike[str] | None = None) -> Tuned:
        """Tune.

        Args:
            callbacks: more of them, heard before the source's own.
            resume: a folder with a checkpoint of the same, to go on from.

        Raises:
            InputError, Diverged, RunError: as `tune`.
        """
        plan, task = self.plan, self.task
        metric, direction = (None, None) if self.wanted is None else self.wanted
        try:
            with jax.enable_x64(plan.precision == 64):
                found = tune(
                    task.problem, task.data, task.x, task.y, rounds=plan.rounds or 0, key=task.key, engine=self.engine,
                    metric=metric, direction=direction, candidates=self.candidates, max_bytes=self.max_bytes,
                    algorithms=None if self.algorithms is None else list(self.algorithms.values()),
                    batch_size=self.batch_size, metrics=task.metrics, evaluate_every=plan.evaluate_every, keep=plan.keep,
                    callbacks=[*callbacks, *listed(plan.source.callbacks, "callbacks=")], resume=resume, check=plan.check,
                    client_metrics=task.client_metrics, share_metrics=task.share_metrics,
                )  # fmt: skip
        except RunError as error:
            if isinstance(error.result, Tuned):
                error.result = self._named(error.result)
            raise
        return self._named(found)

    def config(self) -> dict[str, JSON]:
        """For config.json: every setting that decides the numbers.

        The rounds are among them, other than for a run: they say when candidates are dropped.
        """
        plan = self.plan
        given = None if self.algorithms is None else {name: describe(each) for name, each in self.algorithms.items()}
        how = ("cohort", "engine", "evaluate_every", "precision")
        return {
            **plan.source.config(),
            "tune": {
                "rounds": plan.rounds, "metric": OUTER_LOSS + ":min" if self.wanted is None else str(self.wanted),
                "candidates": self.candidates, "batch_size": self.batch_size, "max_bytes": self.max_bytes,
                "algorithms": given,
            },
            "steps": {NAME: "auto"},
            "seeds": list(plan.seeds),
            **{name: getattr(plan, name) for name in how},
            **({} if plan.compile == "auto" else {"compile": plan.compile}),
            **({} if plan.keep is None else {"keep": plan.keep}),
            "clients_an_exchange": check_cohort(plan.cohort, self.task.data.clients),
        }  # fmt: skip

    def told(self, own: Algorithm) -> dict[str, JSON]:
        """In words, for the server of a network.

        Args:
            own: the application's algorithm.

        Raises:
            InputError: a candidate cannot be told in words.
        """
        named = [(name, *in_words(each, own)) for name, each in (self.algorithms or {}).items()]
        entries = [{"label": label, "kind": kind, "settings": given} for label, kind, given in named]
        return {
            "metric": None if self.wanted is None else str(self.wanted), "candidates": self.candidates,
            "batch_size": self.batch_size, "max_bytes": self.max_bytes, "entries": entries or None,
        }  # fmt: skip

    def open(self, out: str | os.PathLike[str], resume: bool, overwrite: bool) -> Path:
        """The folder for it, with config.json.

        Raises:
            InputError: as `results.folder.opened`.
        """
        return opened(out, self.config(), resume=resume, overwrite=overwrite)

    def _named(self, found: Tuned) -> Tuned:
        return dataclasses.replace(found, candidates=self.named(found.candidates))

    def named(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Candidates by the names that the command has for them."""
        names = {title_of(algorithm): name for name, algorithm in (self.algorithms or {}).items()}
        return [dataclasses.replace(each, name=names.get(each.algorithm, each.name)) for each in candidates]


def keep_tuned(tuning: Tuning, place: Path, *, resume: bool = False, quiet: bool = False, every: float = 30.0) -> Tuned:
    """Tune, and leave all that there is of it in a folder, however it ends.

    Args:
        place: the folder, opened.
        resume: go on from the checkpoint in it, if there is one.
        quiet: whether no progress is shown.
        every: seconds between checkpoints.

    Raises:
        InputError, Diverged, RunError: as `tune`.
        KeyboardInterrupt: it was interrupted; the leader's x and y are in the folder, and the checkpoint.
    """
    if not (resume and (place / CHECKPOINT).is_file()):
        (place / CANDIDATES).unlink(missing_ok=True)  # an earlier one's
    ours: list[Callback] = [_Interrupted(tuning, place), *([] if quiet else [Racing(tuning.name)])]
    try:
        found = keep(tuning, place, resume=resume, quiet=True, every=every, callbacks=ours)
    except RunError as error:
        if isinstance(error.result, Tuned):
            _write(place / CANDIDATES, error.result.candidates)
        raise
    assert isinstance(found, Tuned)
    _write(place / CANDIDATES, found.candidates)
    tell(place, {**ended(found), **went_on(place), "chosen": chosen(found)})
    return found


def chosen(found: Tuned) -> dict[str, JSON]:
    """The algorithm that was left, with its numbers, and what all took."""
    return {
        "algorithm": title_of(found.algorithm), "settings": describe(found.algorithm),
        "rounds": found.rounds, "bytes_down": found.bytes_down, "bytes_up": found.bytes_up,
    }  # fmt: skip


def rows(candidates: Iterable[Candidate]) -> list[dict[str, JSON]]:
    """Candidates as plain values; a score that is not finite is None."""
    plain = (dataclasses.asdict(each) for each in candidates)
    return [each | {"score": each["score"] if math.isfinite(each["score"]) else None} for each in plain]


def raced(place: Path) -> list[Candidate]:
    """The candidates as a folder has them."""
    with (place / CANDIDATES).open(newline="") as text:
        return [
            Candidate(
                line["name"], line["algorithm"], float(line["tempo"]), float(line["score"] or "nan"),
                int(line["round"]) if line["round"] else None, line["why"],
            )
            for line in csv.DictReader(text)
        ]  # fmt: skip


def _write(file: Path, candidates: Iterable[Candidate]) -> None:
    """A line each."""
    with file.open("w", newline="") as text:
        lines = csv.DictWriter(text, [field.name for field in dataclasses.fields(Candidate)])
        lines.writeheader()
        lines.writerows(rows(candidates))


class Racing(Progress):
    """Progress with how many candidates race, and when another program is compiled for those that are left."""

    _many = 0

    def start(self, run: Running) -> None:
        super().start(run)
        self._tell(run, "compiling")

    def advance(self, run: Running) -> None:
        fewer = run.candidates != self._many
        self._tell(run, self._news(run) + (", compiling" if fewer else ""))

    def _tell(self, run: Running, news: str) -> None:
        self._many = run.candidates
        if self._meter is not None:
            several = f"{self._many} candidates, " if self._many > 1 else ""
            self._meter.update(run.progress, several + news)


class _Interrupted(Callback):
    """Where a race is interrupted, what there is of it: the leader's x and y, the best ones, the candidates."""

    def __init__(self, tuning: Tuning, place: Path):
        self._tuning, self._place = tuning, place

    def finish(self, run: Running, error: BaseException | None) -> None:
        if not isinstance(error, KeyboardInterrupt):
            return  # it is kept as that of any run
        both = run.x, run.y
        save_arrays(dict(zip("xy", both, strict=True)), self._place / VARIABLES)
        best = None if run.kept is None else run.kept.result(both)
        if best is not None:
            save_best(best, self._place / BEST)
        figures: dict[str, JSON] = {} if best is None else {"best": figures_of(best)}
        tell(self._place, {"status": "interrupted", "iterations": run.iteration, **figures})
        heats = run.totals().get("heats")
        if isinstance(heats, dict):
            _write(self._place / CANDIDATES, self._tuning.named(Candidate(**each) for each in heats["table"]))
