"""The history as a CSV file that grows while the run goes on."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TextIO

from ..metrics import COLUMNS, check_constants
from ..result import EMPTY
from .base import Callback, Row, Rows


class CSV(Callback):
    """Writes each history row as it appears, so that a run that fails leaves all there was.

    Columns that appear later (a run resumed with other metrics has new ones) come last, and the
    file is then written again, whole, in one step; so it is where a run goes back, or is stopped. A place where nothing was
    taken is empty.

    Args:
        path: the file; it is replaced at the start (a resumed run writes its restored rows first).
        extra: constant columns to put first, for example `{"algorithm": "aggitd", "seed": 0}`.
    """

    in_bulk = True

    def __init__(self, path: str | os.PathLike[str], extra: Mapping[str, str | float | None] | None = None):
        self.path, self.extra = Path(path), dict(extra or {})
        self._file: TextIO | None = None
        self._columns: list[str] = []

    def start(self, run: Rows) -> None:
        check_constants(self.extra, {*COLUMNS, *run.metrics})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._whole(run)

    def record(self, run: Rows, rows: list[Row]) -> None:
        if set().union(*rows) - set(self._columns):
            self._whole(run)
            return
        if self._file is not None:
            self._write(self._file, rows)

    def went_back(self, run: Rows) -> None:
        self._whole(run)

    def finish(self, run: Rows, error: BaseException | None) -> None:
        if self._file is not None and run.history.columns != self._columns:  # the reason for stopping is new
            self._whole(run)
        if self._file is not None:
            self._file.close()

    def _whole(self, run: Rows) -> None:
        """All rows, beside the file and then in its place."""
        if self._file is not None:
            self._file.close()
        beside = self.path.with_name(self.path.name + ".new")
        self._columns = run.history.columns
        with beside.open("w", newline="") as file:
            if self._columns:
                csv.writer(file).writerow([*self.extra, *self._columns])
            self._write(file, run.history)
        os.replace(beside, self.path)
        self._file = self.path.open("a", newline="")

    def _write(self, file: TextIO, rows: Iterable[Row]) -> None:
        shown = lambda value: "" if value is EMPTY or value is None else value
        constant = list(self.extra.values())
        lines = [[shown(row.get(name)) for name in self._columns] for row in rows]
        csv.writer(file).writerows(constant + line for line in lines)
        file.flush()
