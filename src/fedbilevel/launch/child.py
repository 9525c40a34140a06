"""What a process of the launcher runs in: the script, and a thread that ends it when the launcher says so, or is gone."""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import threading
import time
import traceback
from pathlib import Path

from ..errors import InputError, RunError, with_notes
from ..processes import GONE, left, note, of_another, rank
from .launcher import LIFELINE

_WAIT = 5.0  # seconds for the launcher to end this process, where another one is at fault


def main() -> None:
    """Run the script named on the command line, and exit as it does: 0, its own code, or 1 after an error."""
    threading.Thread(target=_until_the_end, args=(int(os.environ.pop(LIFELINE)),), daemon=True).start()
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code or left():  # in the middle of a run, others wait for this one
            _exit(_code(end.code))
    except BaseException as error:
        _exit(_failed(error))


def _code(given: int | str | None) -> int:
    """What a process exits with: 1 where others cannot go on without it."""
    if isinstance(given, str):
        return _say(given)
    return given or 1


def _until_the_end(lifeline: int) -> None:
    """Nothing is ever written to the pipe: it ends when the launcher closes it, or has ended itself."""
    with contextlib.suppress(OSError):
        os.read(lifeline, 1)
    os._exit(1)  # the main thread may wait for another process for ever, where no exception reaches it


def _failed(error: BaseException) -> int:
    if of_another(error):
        note(f"{GONE}-{rank()[1]}", "")
        time.sleep(_WAIT)
        return _say(with_notes(error))
    if isinstance(error, (InputError, RunError)):  # of all processes the same: the first says it
        time.sleep(_WAIT if rank()[1] else 0.0)
        return _say(with_notes(error))
    traceback.print_exception(error)
    return 1


def _say(sentence: str) -> int:
    print(f"fedbilevel: {sentence}", file=sys.stderr)
    return 1


def _exit(code: int) -> None:
    """End at once: what JAX does at the end of a process waits for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
