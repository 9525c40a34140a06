"""A compiled program that asks Python for numbers: it runs in a thread beside, and what it asks for is done in the caller's.

XLA calls Python from whichever of its threads comes by, several at once. Libraries with threads of their own mind: each
thread that computes with PyTorch has another team of workers, which then stand in each other's way (on two cores a
convolution took twice as long). So all of it is done where the user's own code runs, one call after the other.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_ALONE = threading.Lock()  # several callers' requests, and those of programs that nobody serves


class _Call:
    """A call, and what came of it."""

    def __init__(self, function: Callable[..., Any], args: tuple):
        self.function, self.args = function, args
        self.done = threading.Lock()
        self.done.acquire()
        self.out: Any = None
        self.error: BaseException | None = None

    def make(self) -> None:
        """Make it."""
        try:
            with _ALONE:
                self.out = self.function(*self.args)
        except BaseException as error:  # it is raised where it was asked for
            self.error = error
        self.done.release()

    def result(self) -> Any:
        """What came of it."""
        self.done.acquire()
        if self.error is not None:
            raise self.error
        return self.out


class _Worker:
    """A thread that runs one program after the other. A new one for each would have C's library keep memory for each."""

    def __init__(self):
        self.given: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="fedbilevel-beside", daemon=True).start()

    def _work(self) -> None:
        while True:
            self.given.get()()
            _IDLE.append(self)


_IDLE: list[_Worker] = []
if hasattr(os, "register_at_fork"):  # threads stay behind
    os.register_at_fork(after_in_child=_IDLE.clear)


def _in_a_thread(function: Callable[[], None]) -> None:
    """Have it called beside, in a thread that has nothing else to do."""
    try:
        worker = _IDLE.pop()
    except IndexError:
        worker = _Worker()
    worker.given.put(function)


class Served:
    """A program that runs beside, and the thread that serves it."""

    def __init__(self):
        self._asked: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._interrupt: BaseException | None = None

    def run(self, program: Callable[[], T]) -> T:
        """What a program returns, which runs in a thread of its own; whatever it asks for is done here.

        Ctrl-C is heard when the program has come to its end.
        """
        whole = _Call(program, ())

        def beside() -> None:
            try:
                whole.out = whole.function()
            except BaseException as error:  # it is raised by the caller
                whole.error = error
            whole.done.release()
            self._asked.put(None)

        _in_a_thread(beside)
        while True:
            try:
                call = self._asked.get()
                if call is None:
                    break
                call.make()
                if call.error is not None and not isinstance(call.error, Exception):
                    self._interrupt = call.error
            except KeyboardInterrupt as interrupt:  # between two calls
                self._interrupt = interrupt
        if self._interrupt is not None:
            raise self._interrupt
        return whole.result()

    def ask(self, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)`, in the thread that serves."""
        call = _Call(function, args)
        self._asked.put(call)
        return call.result()


def alone(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)` here, while nobody else's is made."""
    with _ALONE:
        return function(*args)
