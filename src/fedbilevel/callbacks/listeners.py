"""The callbacks of a run: each of them hears what there is to hear, whatever another one does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import InputError, RunError, check
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

    Attributes:
        saves: whether one of them keeps what the run can be resumed from.
        row_by_row: whether one of them has to hear of a row before the next iteration begins.
    """

    def __init__(self, callbacks: Sequence[Callback]):
        self._all, self._started = _checked(callbacks, "callbacks= is a list of callbacks"), list[Callback]()
        self.saves = any(callback.saves for callback in self._all)
        self.row_by_row = any(_waits_for_rows(callback) for callback in self._all)

    def start(self, run: Running) -> None:
        """Tell all of the start, up to the first that fails.

        Raises:
            InputError: one cannot be used.
            RunError: one failed otherwise.
        """
        for callback in self._all:
            try:
                callback.start(run)
            except InputError:
                raise
            except Exception as error:  # whatever the user's callback raises
                raise _failed(callback, error) from error
            self._started.append(callback)

    def advance(self, run: Running) -> None:
        """Tell all of a stretch. Raises RunError, once all have heard, if one fails; so do the next two."""
        self._tell(lambda callback: callback.advance(run))

    def record(self, run: Running, rows: list[Row]) -> None:
        """Tell all of new rows."""
        self._tell(lambda callback: callback.record(run, rows))

    def went_back(self, run: Running) -> None:
        """Tell all that the run went back."""
        self._tell(lambda callback: callback.went_back(run))

    def finish(self, run: Running, error: BaseException | None) -> BaseException | None:
        """Tell those that have started of the end.

        Returns:
            What the run ends with: `error`, with a note of each callback that fails now, or the first of these. An
            interruption comes before all of them.
        """
        for callback in self._started:
            try:
                callback.finish(run, error)
            except Exception as failure:  # whatever the user's callback raises
                error = _both(error, _failed(callback, failure))
            except BaseException as interruption:  # Ctrl-C: the others still hear of the end
                interruption.__context__ = interruption.__context__ or error
                error = interruption
        return error

    def _tell(self, say: Callable[[Callback], None]) -> None:
        error = None
        for callback in self._all:
            try:
                say(callback)
            except Exception as failure:  # whatever the user's callback raises
                error = _both(error, _failed(callback, failure))
        if error is not None:
            raise error


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
