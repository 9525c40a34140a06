"""The history in Weights & Biases."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import unknown_name
from ..result import EMPTY
from .base import Callback, Row, Rows, Running
from .extras import needed

if TYPE_CHECKING:
    from wandb import Run

_MODES = ("online", "offline", "disabled")


class WeightsAndBiases(Callback):
    """Logs each row of the history to a run of Weights & Biases, with the algorithm's settings as its configuration.

    Every column goes there under its name (metrics, diagnostics, rounds, bytes, seconds), by iteration unless the chart's
    axis is set to `rounds`. A log there only grows: rows that were given up, because the run went back, stay in it, and a
    run that is resumed is a new one there, with all rows. The reason for which a run was stopped is `stopped` in its
    summary.

    Needs wandb: `pip install 'fedbilevel[wandb]'`. `mode="offline"` needs no account and no network; `wandb sync` sends
    what it leaves.

    Args:
        project: the project's name; None: as wandb is set up.
        mode: "online", "offline" or "disabled"; None: as wandb is set up.
        name: the run's name; None: wandb makes one up.
        folder: where wandb keeps its files, in `wandb` within; None: here.

    Raises:
        InputError: there is no such mode; at the start of a run, that wandb is not installed.
    """

    in_bulk = True

    def __init__(
        self,
        project: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        name: str | None = None,
        folder: str | os.PathLike[str] | None = None,
    ):
        if mode is not None and mode not in _MODES:
            raise unknown_name("mode of wandb", mode, _MODES)
        self.project, self.mode, self.name = project, mode, name
        self.folder = None if folder is None else Path(folder)
        self._run: Run | None = None

    def start(self, run: Running) -> None:
        wandb = needed("wandb", "wandb", "WeightsAndBiases")
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        log: Run = wandb.init(
            project=self.project, mode=self.mode, name=self.name, dir=None if self.folder is None else str(self.folder),
            config=_settings(run), reinit="create_new",
        )  # fmt: skip
        log.define_metric("iteration", hidden=True)
        log.define_metric("*", step_metric="iteration")
        self._run = log
        self._log(run.history)

    def record(self, run: Rows, rows: list[Row]) -> None:
        self._log(rows)

    def finish(self, run: Running, error: BaseException | None) -> None:
        if self._run is None:
            return
        if (reason := run.history.stopped) is not None:
            self._run.summary["stopped"] = reason
        self._run.finish(exit_code=int(error is not None))
        self._run = None

    def _log(self, rows: Iterable[Row]) -> None:
        if self._run is not None:
            for row in rows:
                self._run.log({name: value for name, value in row.items() if value is not EMPTY})


def _settings(run: Running) -> dict[str, bool | int | float | str | None]:
    """The algorithm's name and fields, as plain values."""
    algorithm = run.algorithm
    plain = lambda value: value if value is None or isinstance(value, bool | int | float | str) else str(value)
    fields = {field.name: plain(getattr(algorithm, field.name)) for field in dataclasses.fields(algorithm)}
    return {"algorithm": type(algorithm).__name__, **fields}
