"""A live progress bar; in a log file, a line now and then."""

from __future__ import annotations

import sys
import time

from .base import Callback

_LOG_EVERY = 5.0  # seconds between lines where the output is no terminal


class Progress(Callback):
    """Shows iterations, rounds and the latest metrics while a run goes on, on standard error.

    Args:
        label: what to call the run.
    """

    def __init__(self, label: str = ""):
        self.label = label
        self._bar = self._console = None
        self._told = 0.0

    def start(self, run) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = Console(file=sys.stderr)
        self._told = time.monotonic()
        if not self._console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[news]}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=self._console, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task(self.label, total=run.goal, completed=run.progress, news="compiling")
        self._bar.start()

    def advance(self, run) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=run.progress, news=self._news(run))
        elif time.monotonic() - self._told > _LOG_EVERY:
            self._told = time.monotonic()
            print(f"{self.label}: {self._news(run)}", file=sys.stderr, flush=True)

    def finish(self, run, error) -> None:
        if self._bar is not None:
            self._bar.stop()

    @staticmethod
    def _news(run) -> str:
        last = run.history[-1] if run.history else {}
        metrics = ", ".join(f"{name} {last[name]:.4g}" for name in run.metrics if name in last)
        return f"iteration {run.iteration}, {run.rounds} rounds" + (f", {metrics}" if metrics else "")
