"""The command line: parses, calls the library, prints. Exit codes: 0 done, 1 the run failed, 2 bad usage."""

from __future__ import annotations

import sys
from typing import cast

import typer

from . import added, checkup, folders, runs, search, tune
from .options import app

_INTERRUPTED = 130  # what typer makes of Ctrl-C
_UsageError = cast(  # typer does not name it: what BadParameter is one of, with `format_message` too
    type[typer.BadParameter], next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")
)


def main() -> None:
    """Entry point: one sentence and exit code 2 for bad usage, 1 for a run that failed."""
    from ..errors import InputError, RunError, heard, with_notes

    try:
        with heard(_warn):
            code = app(standalone_mode=False)
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except _UsageError as error:
        sys.exit(_say(f"{error.format_message()} (see fedbilevel --help)", 2))
    except InputError as error:
        sys.exit(_say(with_notes(error), 2))
    except RunError as error:
        sys.exit(_say(with_notes(error), 1))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_say("interrupted: what was run is kept with --out; the same command with --resume goes on.", 1))
    except OSError as error:
        sys.exit(_say(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), 1))


def _warn(sentence: str) -> None:
    _say(f"warning: {sentence}", 0)


def _say(sentence: str, code: int) -> int:
    print(f"fedbilevel: {sentence}", file=sys.stderr)
    return code
