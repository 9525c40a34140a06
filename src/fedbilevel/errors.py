"""The two ways in which the library says no: the input is unusable, or the run came to grief."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO


class InputError(ValueError):
    """Something a caller passed cannot be used; the message says what, which value, and what to do instead."""


class RunError(RuntimeError):
    """A run that started well failed; `result` holds all there is up to its last finite iteration.

    Attributes:
        result: a `fedbilevel.Result` (None where the failing call returns none).
    """

    def __init__(self, message: str, result: Any = None):
        super().__init__(message)
        self.result = result


class Diverged(RunError):
    """The iterates blew up; the message names the quantity, the iteration and the step to lower."""


class ClientError(RunError):
    """A client's method failed; the message names the client, the method and the shapes it was sent."""


def with_notes(error: BaseException) -> str:
    """What an error says, and its notes of what else failed then."""
    return " ".join([str(error), *(f"({note})" for note in getattr(error, "__notes__", ()))])


class FedbilevelWarning(UserWarning):
    """Something runs, and may not mean what it seems to; the message says what, and what to do about it."""


_OURS = str(Path(__file__).parent)
_CHECKERS = (f"{os.sep}jaxtyping{os.sep}", "<@beartype(")  # they call us for the user, who has them check annotations


def warn(message: str) -> None:
    """Warn in one sentence, with the place of the user's own call."""
    warnings.warn(message, FedbilevelWarning, stacklevel=calls_up(sys._getframe()))


def calls_up(frame: FrameType | None) -> int:
    """How many calls up from a frame, itself one, the user's own is: the nearest outside this package."""
    level = 1
    importing = lambda file: "importlib" in file and "_bootstrap" in file  # which `warnings` does not count
    between = lambda file: file.startswith(_OURS) or any(name in file for name in _CHECKERS) or importing(file)
    while frame is not None and (between(frame.f_code.co_filename) or "__tracebackhide__" in frame.f_locals):
        level += not importing(frame.f_code.co_filename)
        frame = frame.f_back
    return level


@contextlib.contextmanager
def heard(tell: Callable[[str], None]) -> Iterator[None]:
    """Have `tell` hear of our warnings, each sentence once, instead of whom Python would tell."""
    told: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", FedbilevelWarning)
        others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, FedbilevelWarning):
                others(message, category, filename, lineno, file, line)
            elif str(message) not in told:
                told.add(str(message))
                tell(str(message))

        warnings.showwarning = show
        yield


def noting(sentences: list[str]) -> contextlib.AbstractContextManager[None]:
    """Collect our own warnings, each once, for whoever is to read them elsewhere; others are shown as ever."""
    return heard(sentences.append)


def unknown_name(kind: str, name: object, known: Iterable[str]) -> InputError:
    """An `InputError` for `name`, with the nearest of the `known` names."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"there is no {kind} {name!r}: {hint}known are {', '.join(known)}.")


def check(condition: object, message: str | Callable[[], str]) -> None:
    """Raise `InputError(message)` unless `condition` holds. A message that takes time to write is a function."""
    if not condition:
        raise InputError(message if isinstance(message, str) else message())
