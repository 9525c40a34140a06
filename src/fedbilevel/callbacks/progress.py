"""A live progress bar; in a log file, a line now and then."""

from __future__ import annotations

import sys
import time

from .base import Callback, Running

_LOG_EVERY = 5.0  # seconds between lines where the output is no terminal


class Meter:
    """How far a long piece of work is, on standard error: a live bar, or a line now and then where that is no terminal.

    Args:
        label: what to call the work.
        total: how much there is to do, in units of the caller's.
        done: how much of it is done already.
        news: what goes on at first.
    """

    def __init__(self, label: str, total: float | None, done: float = 0, news: str = "compiling"):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.label = label
        self._told, self._bar, self._news = time.monotonic(), None, ""
        console = Console(file=sys.stderr)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[news]}"),
                TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(label, total=total, news=news)
            self._bar.update(self._task, completed=done)
            self._bar.start()

    def update(self, done: float, news: str) -> None:
        """So much is done, and a word about it."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, news=news)
        elif time.monotonic() - self._told > _LOG_EVERY and news != self._news:
            self._told, self._news = time.monotonic(), news
            print(f"{self.label}: {news}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Progress(Callback):
    """Shows iterations, rounds and the latest metrics while a run goes on, on standard error.

    Args:
        label: what to call the run.
    """

    def __init__(self, label: str = ""):
        self.label = label
        self._meter: Meter | None = None

    def start(self, run: Running) -> None:
        self._meter = Meter(self.label, run.goal, run.progress)

    def advance(self, run: Running) -> None:
        if self._meter is not None:
            self._meter.update(run.progress, self._news(run))

    def finish(self, run: Running, error: BaseException | None) -> None:
        if self._meter is not None:
            self._meter.stop()

    @staticmethod
    def _news(run: Running) -> str:
        last = run.history[-1] if run.history else {}
        metrics = ", ".join(f"{name} {last[name]:.4g}" for name in run.metrics if name in last)
        return f"iteration {run.iteration}, {run.rounds} rounds" + (f", {metrics}" if metrics else "")
