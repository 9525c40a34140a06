"""What a callback may see and do: it is told of the start, of every stretch of iterations, of new rows, of the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias, runtime_checkable

from jax.typing import ArrayLike
from jaxtyping import PyTree

from ..algorithm import Algorithm
from ..engines.base import Carry
from ..given import JSON
from ..own_lower import Lower
from ..result import History

Row: TypeAlias = dict[str, float]  # of the history, by column


@runtime_checkable
class Rows(Protocol):
    """The rows of a run so far, and its metrics by name: all that who writes them down needs."""

    @property
    def history(self) -> History: ...

    @property
    def metrics(self) -> Mapping[str, Callable[[PyTree, PyTree], ArrayLike]]: ...


@runtime_checkable
class Running(Rows, Protocol):
    """A run in progress as callbacks see it: a `fedbilevel.run.Run`."""

    @property
    def algorithm(self) -> Algorithm: ...

    @property
    def lower(self) -> Lower: ...

    @property
    def carry(self) -> Carry: ...

    @property
    def snapshot(self) -> Carry | None: ...

    @property
    def iteration(self) -> int: ...

    @property
    def rounds(self) -> int: ...

    @property
    def goal(self) -> int | None: ...

    @property
    def progress(self) -> int: ...

    def keep(self, carry: Carry) -> None: ...

    def totals(self) -> dict[str, JSON]: ...

    def fingerprint(self) -> dict[str, JSON]: ...


class Callback:
    """Does nothing; override what you need. `run` is the running `fedbilevel.run.Run`: read it, leave it as it is.

    `saves`: whether it keeps what the run can be resumed from; it then calls `run.keep(run.carry)` whenever it has.
    """

    saves = False

    def start(self, run: Running) -> None:
        """Before the first iteration (after a resumed run's history is restored)."""

    def advance(self, run: Running) -> None:
        """After every stretch of iterations, at most about half a second long: `run.iteration`, `run.rounds` are new."""

    def record(self, run: Running, rows: list[Row]) -> None:
        """New rows of the history."""

    def went_back(self, run: Running) -> None:
        """The run went back to an earlier iteration: `run.history` has lost the rows after it."""

    def finish(self, run: Running, error: BaseException | None) -> None:
        """The run ended, well (None) or by `error`; called exactly once, also after Ctrl-C."""
