"""What a callback may see and do: it is told of the start, of every stretch of iterations, of new rows, of the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..run import Run


class Callback:
    """Does nothing; override what you need. `run` is the running `fedbilevel.run.Run`: read it, leave it as it is.

    `saves`: whether it keeps what the run can be resumed from; it then calls `run.keep(run.carry)` whenever it has.
    """

    saves = False

    def start(self, run: Run) -> None:
        """Before the first iteration (after a resumed run's history is restored)."""

    def advance(self, run: Run) -> None:
        """After every stretch of iterations, at most about half a second long: `run.iteration`, `run.rounds` are new."""

    def record(self, run: Run, rows: list[dict[str, Any]]) -> None:
        """New rows of the history."""

    def went_back(self, run: Run) -> None:
        """The run went back to an earlier iteration: `run.history` has lost the rows after it."""

    def finish(self, run: Run, error: BaseException | None) -> None:
        """The run ended, well (None) or by `error`; called exactly once, also after Ctrl-C."""
