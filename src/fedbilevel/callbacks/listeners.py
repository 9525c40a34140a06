"""The callbacks of a run: each of them hears what there is to hear, whatever another one does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import InputError, RunError, check
from ..processes import ALONE, Processes
from .base import Callback, Row, Running


def listed(callbacks: Sequence[Callback] | Callable[[], Sequence[Callback]], name: str) -> list[Callback]:
    """The callbacks of a list, or those that a function makes.

    Args:
        name: what they are called where they were given.

    Raises:
        InputError: they are something else, or the function fails.
    """
    if isinstance(callbacks, Sequence) or not callable(callbacks):
        return _checked(callbacks, f"{name} is a list of callbacks, or a function () -> a list")
    try:
        made = callbacks()
    except Exception as error:  # whatever the user's function raises
        raise InputError(f"the function in {name} failed: {type(error).__name__}: {error}") from error
    return _checked(made, f"the function in {name} returns a list of callbacks")


def _checked(callbacks: Sequence[Callback], what: str) -> list[Callback]:
    good = isinstance(callbacks, Sequence) and all(isinstance(each, Callback) for each in callbacks)
    check(good, f"{what} such as fedbilevel.callbacks.CSV(...); got {callbacks!r}.")
    return list(callbacks)


class Listeners:
    """All callbacks of a run.

    Of several processes, 0 alone calls them, and the others are told what comes of it. Those that save are called in all,
    after the others: what they keep may have to be asked of all.

    Attributes:
        saves: whether one of them keeps what the run can be resumed from.
        row_by_row: whether one of them has to hear of a row before the next iteration begins.
    """

    def __init__(self, callbacks: Sequence[Callback], processes: Processes = ALONE):
        self._all, self._started = _checked(callbacks, "callbacks= is a list of callbacks"), list[Callback]()
        self._processes = processes
        self.saves = any(callback.saves for callback in self._all)
        self.row_by_row = any(_waits_for_rows(callback) for callback in self._all)

    def start(self, run: Running) -> None:
        """Tell all of the start, up to the first that fails.

        Raises:
            InputError: one cannot be used.
            RunError: one failed otherwise.
        """

        def start(callbacks: Sequence[Callback]) -> None:
            for callback in callbacks:
                try:
                    callback.start(run)
                except InputError:
                    raise
                except Exception as error:  # whatever the user's callback raises
                    raise _failed(callback, error) from error
                self._started.append(callback)

        self._have(run, start)

    def advance(self, run: Running) -> None:
        """Tell all of a stretch. Raises RunError, once all have heard, if one fails; so do the next two."""
        self._tell(run, lambda callback: callback.advance(run))

    def record(self, run: Running, rows: list[Row]) -> None:
        """Tell all of new rows."""
        self._tell(run, lambda callback: callback.record(run, rows))

    def went_back(self, run: Running) -> None:
        """Tell all that the run went back."""
        self._tell(run, lambda callback: callback.went_back(run))

    def finish(self, run: Running, error: BaseException | None) -> BaseException | None:
        """Tell those that have started of the end.

        Returns:
            What the run ends with: `error`, with a note of each callback that fails now, or the first of these. An
            interruption comes before all of them.
        """
        if self._processes.count == 1:
            return _finish(self._started, run, error)
        saving, others = _apart(self._started)
        if self._processes.lost:  # nobody can be asked: what does not need the others is closed
            return _finish(others, run, error)

        def finish() -> None:
            ended = _finish(others, run, error)
            if ended is not None and ended is not error:
                raise ended

        try:
            self._processes.said(finish)
        except RunError as failure:
            error = error or failure
        return _finish(saving, run, error)

    def _tell(self, run: Running, say: Callable[[Callback], None]) -> None:
        def tell(callbacks: Sequence[Callback]) -> None:
            error = None
            for callback in callbacks:
                try:
                    say(callback)
                except Exception as failure:  # whatever the user's callback raises
                    error = _both(error, _failed(callback, failure))
            if error is not None:
                raise error

        self._have(run, tell)

    def _have(self, run: Running, act: Callable[[Sequence[Callback]], None]) -> None:
        if self._processes.count == 1 or not self._all:
            return act(self._all)
        saving, others = _apart(self._all)

        def ask() -> str | None:
            act(others)
            return run.stopped

        reason = self._processes.said(ask)
        if reason is not None:
            run.stop(reason)
        try:
            act(saving)
        except Exception:  # in this process, and nobody knows whether in the others: they are asked nothing more
            self._processes.lost = True
            raise


def _apart(callbacks: Sequence[Callback]) -> tuple[list[Callback], list[Callback]]:
    """(Those that save, the others)."""
    return [each for each in callbacks if each.saves], [each for each in callbacks if not each.saves]


def _finish(callbacks: Sequence[Callback], run: Running, error: BaseException | None) -> BaseException | None:
    for callback in callbacks:
        try:
            callback.finish(run, error)
        except Exception as failure:  # whatever the user's callback raises
            error = _both(error, _failed(callback, failure))
        except BaseException as interruption:  # Ctrl-C: the others still hear of the end
            interruption.__context__ = interruption.__context__ or error
            error = interruption
    return error


def _waits_for_rows(callback: Callback) -> bool:
    """Whether it reads rows, and not in bulk."""
    own = getattr(callback.record, "__func__", callback.record) is not Callback.record
    return own and not callback.in_bulk


def _failed(callback: Callback, error: Exception) -> RunError:
    """The error of a run whose callback raised another."""
    failure = RunError(f"the callback {type(callback).__name__} failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _both(first: BaseException | None, second: RunError) -> BaseException:
    """The first error, with a note of the second, unless that is the same once more."""
    if first is None:
        return second
    if str(first) != str(second):
        first.add_note(f"Then {second}")
    return first
