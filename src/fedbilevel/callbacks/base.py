"""What a callback may see and do: it is told of the start, of every stretch of iterations, of new rows, of the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from jax.typing import ArrayLike
from jaxtyping import PyTree

from ..algorithm import Algorithm
from ..best import Kept
from ..engines.base import Carry
from ..given import JSON
from ..own_lower import Lower
from ..processes import Processes
from ..result import History
from ..result import Row as Row  # of the history, by column


@runtime_checkable
class Rows(Protocol):
    """The rows of a run so far, and its metrics by name: all that who writes them down needs."""

    @property
    def history(self) -> History: ...

    @property
    def metrics(self) -> Mapping[str, Callable[[PyTree, PyTree], ArrayLike]]: ...


@runtime_checkable
class Running(Rows, Protocol):
    """A run in progress as callbacks see it: read it, leave it as it is, and `stop` it if need be.

    Attributes:
        x, y: the variables after `iteration` iterations, structured like the start. y is None where it stays with the
            clients (see `Result`).
        iteration: iterations done.
        rounds: communication rounds so far.
        bytes_down, bytes_up: payload so far, in bytes, from the server and to it, over all clients.
        seconds: seconds of computation so far, without compilation and evaluation.
        goal: the iterations or rounds that were asked for.
        progress: how many of them are done.
        history: the `History`, the rows so far.
        metrics: the metrics, functions of (x, y), by name.
        algorithm: what runs.
        candidates: how many race (`fb.tune`); 1 where there is no race.
        stopped: the reason of the first who called `stop`; None as long as nobody has.
        kept: with `keep=`, what it keeps: `kept.best` is the best so far (x, y, iteration, rounds, value), or None.
        lower, carry, snapshot: where y is, and the states to go on from: for callbacks that save.
        processes: those of the run (`fedbilevel.processes`): which of them this is, and what they tell each other.
    """

    @property
    def x(self) -> PyTree: ...

    @property
    def y(self) -> PyTree: ...

    @property
    def iteration(self) -> int: ...

    @property
    def rounds(self) -> int: ...

    @property
    def bytes_down(self) -> int: ...

    @property
    def bytes_up(self) -> int: ...

    @property
    def seconds(self) -> float: ...

    @property
    def goal(self) -> int | None: ...

    @property
    def progress(self) -> int: ...

    @property
    def algorithm(self) -> Algorithm: ...

    @property
    def candidates(self) -> int: ...

    @property
    def stopped(self) -> str | None: ...

    def stop(self, reason: str) -> None:
        """End the run well, at the iteration that it has come to.

        The reason stands in `Result.stopped` and in the history's last row. The first reason counts.

        Args:
            reason: a text of one line.

        Raises:
            InputError: it is no such text.
        """

    @property
    def kept(self) -> Kept | None: ...

    @property
    def lower(self) -> Lower: ...

    @property
    def carry(self) -> Carry: ...

    @property
    def snapshot(self) -> Carry | None: ...

    @property
    def processes(self) -> Processes: ...

    def keep(self, carry: Carry) -> None: ...

    def totals(self) -> dict[str, JSON]: ...

    def fingerprint(self) -> dict[str, JSON]: ...


class Callback:
    """Does nothing; override what you need. `run` is a `Running`.

    A method that raises ends the run with a `RunError` that names the callback and holds the result so far; the other
    callbacks hear of the end as ever. (An InputError from `start` stays one: nothing has run yet.)

    Of several processes (see "Several machines") process 0 calls it, and no other: what it raises, or stops, holds in all.

    Attributes:
        saves: whether it keeps what the run can be resumed from; it then calls `run.keep(run.carry)` whenever it has. Of
            several processes all call it, and `run.processes.said(...)` is what process 0 does or says.
        in_bulk: whether `record` may get the rows of half a second at once, when the run has gone on already. It may for
            one that only writes them down. Where it is False and `record` is overridden, a row comes before the next
            iteration begins: `run.x` is then that row's, and `run.stop` stops right there, on any machine.
    """

    saves = False
    in_bulk = False

    def start(self, run: Running) -> None:
        """Before the first iteration (after a resumed run's history is restored)."""

    def advance(self, run: Running) -> None:
        """After every stretch of iterations, at most about half a second long: `run.iteration`, `run.rounds` are new.

        Stretches go by the clock: what has to happen at the same iteration every time belongs into `record`.
        """

    def record(self, run: Running, rows: list[Row]) -> None:
        """New rows of the history."""

    def went_back(self, run: Running) -> None:
        """The run went back to an earlier iteration: `run.history` has lost the rows after it."""

    def finish(self, run: Running, error: BaseException | None) -> None:
        """The run ended, well (None) or by `error`; called exactly once, also after Ctrl-C."""
