"""The history as a CSV file that grows while the run goes on."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .base import Callback


class CSV(Callback):
    """Writes each history row as it appears, so that a run that fails leaves all there was.

    Args:
        path: the file; it is replaced at the start (a resumed run rewrites its restored rows first).
        extra: constant columns to put first, for example `{"algorithm": "aggitd", "seed": 0}`.
    """

    def __init__(self, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None):
        self.path, self.extra = Path(path), dict(extra or {})
        self._file: Any = None
        self._writer: Any = None

    def start(self, run) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w", newline="")
        self._writer = None
        self.record(run, run.history)

    def record(self, run, rows) -> None:
        for row in rows:
            row = {**self.extra, **row}
            if self._writer is None:
                self._writer = csv.DictWriter(self._file, fieldnames=list(row))
                self._writer.writeheader()
            self._writer.writerow(row)
        self._file.flush()

    def finish(self, run, error) -> None:
        self._file.close()
