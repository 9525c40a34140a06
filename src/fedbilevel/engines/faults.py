"""What happens when clients fail: the user's policy, and who is left out for a while."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from ..errors import RunError, check
from ..given import Whole, whole_number

REBUILD = "rebuild"


class TooFewReplies(RunError):
    """Too few clients answered an exchange, however often it was tried."""


class StateLost(RunError):
    """A client does not have the state that the server believes it has: it has to be rebuilt."""


@dataclasses.dataclass(frozen=True)
class Faults:
    """What to do when clients do not answer, or answer nonsense. Those who did answer are averaged, as in a drop-out.

    Their weights are scaled to sum to one: where weights differ, that mean is biased towards light clients (`Simulation`).

    Args:
        minimum: how many replies an exchange needs; None: half of the cohort, rounded up.
        deadline: seconds within which a reply must be there.
        retries: how often an exchange with too few replies is tried again, with a fresh cohort where one is drawn.
        exclude_after: after how many failures in a row a client is left out; None: never.
        readmit_after: after how many rounds it is asked again, if it is there.
        lost_state: what if a client has lost the state that it keeps: "rebuild" begins all clients' states (and what the
            server keeps beside x and y) anew; "stop" ends the run.
    """

    minimum: Whole | None = None
    deadline: float = 60.0
    retries: Whole = 3
    exclude_after: Whole | None = 3
    readmit_after: Whole = 20
    lost_state: str = REBUILD

    def __post_init__(self):
        for name, least in (("minimum", 1), ("retries", 0), ("exclude_after", 1), ("readmit_after", 1)):
            value = getattr(self, name)
            if value is not None or name not in ("minimum", "exclude_after"):
                number = whole_number(value, least, f"Faults({name}=...) is a whole number from {least} on")
                object.__setattr__(self, name, number)
        good = isinstance(self.deadline, (int, float)) and not isinstance(self.deadline, bool) and self.deadline > 0
        check(good, f"Faults(deadline=...) is a number of seconds, more than zero; got {self.deadline!r}.")
        good = self.lost_state in (REBUILD, "stop")
        check(good, f"Faults(lost_state=...) is 'rebuild' or 'stop'; got {self.lost_state!r}.")

    def check_cohort(self, cohort: int) -> None:
        """Refuse to need more replies than clients are asked."""
        good = self.minimum is None or self.minimum <= cohort
        check(
            good, f"Faults(minimum={self.minimum}) needs more replies than the {cohort} clients that an exchange asks."
        )

    def enough(self, cohort: int) -> int:
        """How many replies an exchange with a cohort of this size needs."""
        return min(cohort, -(-cohort // 2) if self.minimum is None else int(self.minimum))


class Roster:
    """Who is asked: clients that failed too often in a row are left out until their time has come and they are there."""

    def __init__(self, clients: int, faults: Faults | None):
        self._faults = faults
        self._failures = np.zeros(clients, int)  # in a row
        self._until: dict[int, int] = {}  # clients left out, and the round from which on they may be asked again
        self._round = 0
        self.latest = "none"  # failure, in words

    def left_out(self, there: Callable[[int], bool]) -> set[int]:
        """Those not asked at present; `there` says whether one that is due can be asked again."""
        for client, until in list(self._until.items()):
            if self._round >= until:
                if there(client):
                    del self._until[client]
                else:
                    self._leave_out(client)
        return set(self._until)

    def note(self, answered: Iterable[int], failed: Mapping[int, Exception], rounds: int) -> None:
        """Take note of an exchange that took so many rounds (one, or none beside another)."""
        self._round += rounds
        self._failures[list(answered)] = 0
        for client, error in failed.items():
            self._failures[client] += 1
            self.latest = str(error) or type(error).__name__
            most = None if self._faults is None else self._faults.exclude_after
            if most is not None and self._failures[client] >= most:
                self._leave_out(client)

    def _leave_out(self, client: int) -> None:
        assert self._faults is not None
        self._until[client] = self._round + int(self._faults.readmit_after)
