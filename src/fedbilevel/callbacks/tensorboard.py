"""The history as curves in TensorBoard."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from ..result import EMPTY
from .base import Callback, Row, Rows, Running
from .extras import needed

_STEPS = {"iteration": "", "rounds": "by-rounds"}  # what a curve goes by -> the folder within the folder


class TensorBoard(Callback):
    """Writes each row of the history for TensorBoard: `tensorboard --logdir FOLDER`.

    Every column is a curve of its name (metrics, diagnostics, rounds, bytes, seconds), by iteration in the folder itself,
    and by communication rounds in `by-rounds` within it. Rows that were given up, because the run went back or is run
    anew in the folder, are not shown. The reason for which a run was stopped is a text, `stopped`.

    Needs tensorboardX: `pip install 'fedbilevel[tensorboard]'`.

    Args:
        folder: where to write; a run's own.

    Raises:
        InputError: at the start of a run, that tensorboardX is not installed.
    """

    in_bulk = True

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self._files: dict[str, _Events] = {}

    def start(self, run: Running) -> None:
        needed("tensorboardX", "tensorboard", "TensorBoard")
        self._files = {step: _Events(self.folder / place) for step, place in _STEPS.items()}
        self._from(run, 0)
        self._files["iteration"].text("algorithm", repr(run.algorithm), run.iteration)

    def record(self, run: Rows, rows: list[Row]) -> None:
        self._write(rows)

    def went_back(self, run: Rows) -> None:
        self._from(run, len(run.history))

    def finish(self, run: Running, error: BaseException | None) -> None:
        reason = run.history.stopped
        for file in self._files.values():
            if reason is not None:
                file.text("stopped", reason, run.iteration)
            file.close()

    def _from(self, run: Rows, kept: int) -> None:
        """Show the first so many rows of what was written before, and the history's others."""
        for step, file in self._files.items():
            file.forget(int(run.history[kept - 1][step]) + 1 if kept else 0)
        self._write(run.history[kept:])

    def _write(self, rows: Iterable[Row]) -> None:
        for step, file in self._files.items():
            for row in rows:
                file.row({name: float(value) for name, value in row.items() if value is not EMPTY}, int(row[step]))
            file.flush()


class _Events:
    """A file of events. Written at once: tensorboardX's own SummaryWriter does so in a thread, where errors are lost."""

    def __init__(self, folder: Path):
        from tensorboardX.event_file_writer import EventsWriter

        proto = "tensorboardX.proto"
        self._events, self._summaries = (import_module(f"{proto}.{name}_pb2") for name in ("event", "summary"))
        folder.mkdir(parents=True, exist_ok=True)
        # its names are of whole seconds, and one that is there would be written over
        self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}.{time.monotonic_ns():020}")

    def row(self, values: dict[str, float], step: int) -> None:
        """A point of each curve."""
        value = self._summaries.Summary.Value
        points = [value(tag=name, simple_value=number) for name, number in values.items()]
        self._add(step, summary=self._summaries.Summary(value=points))

    def text(self, name: str, text: str, step: int) -> None:
        """A text."""
        from tensorboardX.summary import text as summary

        self._add(step, summary=summary(name, text))
        self.flush()

    def forget(self, step: int) -> None:
        """Have TensorBoard show nothing that was written before of this step or later ones."""
        log = self._events.SessionLog
        self._add(step, session_log=log(status=log.START))

    def flush(self) -> None:
        """Write what there is."""
        self._file.flush()

    def close(self) -> None:
        """Write what there is, and close."""
        self._file.close()

    def _add(self, step: int, **content: object) -> None:
        self._file.write_event(self._events.Event(step=step, wall_time=time.time(), **content))
