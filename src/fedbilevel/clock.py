"""Seconds of computation: wall-clock time without what JAX spends on compiling."""

from __future__ import annotations

import threading
import time

import jax.monitoring

from .jaxprs import COMPILING

_MOST = 10_000  # spans kept apart, in a thread where nobody asks


class Stopwatch:
    """Measures from its making on, in the thread that makes it."""

    def __init__(self):
        self._begin, self._compiled = time.perf_counter(), compiling()

    def seconds(self) -> float:
        """Seconds so far, without compilation."""
        return time.perf_counter() - self._begin - (compiling() - self._compiled)


def compiling() -> float:
    """Seconds for which this thread has compiled so far; not to be asked while it does."""
    return _own.total()


def spent_compiling(begin: float, end: float) -> None:
    """Say that this thread compiled between two readings of `time.perf_counter`."""
    _own.add(begin, end)


class _Compiled(threading.local):
    """When a thread compiled. A step of it may lie in another, which ends (and is told) later."""

    def __init__(self):
        self.spans: list[tuple[float, float]] = []  # apart from each other, in order
        self.over = 0.0  # seconds of those before

    def add(self, begin: float, end: float) -> None:
        while self.spans and self.spans[-1][1] > begin:
            begin = min(begin, self.spans.pop()[0])
        self.spans.append((begin, end))
        if len(self.spans) > _MOST:
            self.total()

    def total(self) -> float:
        self.over += sum(end - begin for begin, end in self.spans)
        self.spans.clear()
        return self.over


_own = _Compiled()


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    if event.startswith(COMPILING):
        now = time.perf_counter()
        spent_compiling(now - duration_secs, now)


jax.monitoring.register_event_duration_secs_listener(_listen)
