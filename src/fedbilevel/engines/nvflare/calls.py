"""Calls to the sites: what the server may ask of them, and what nvflare brings back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, cast, runtime_checkable

from nvflare.collab import collab

from ...given import JSON, Received


@runtime_checkable
class Results(Protocol):
    """What sites answered to a call: pairs of name and answer; why there is none, by name."""

    failures: Mapping[str, Exception]

    def __iter__(self) -> Iterator[tuple[str, Received]]: ...


@runtime_checkable
class Sites(Protocol):
    """Several sites, asked all at once: `Site`'s methods, as nvflare carries them."""

    def hello(self) -> Results: ...

    def measure(self, common: Mapping[str, JSON]) -> Results: ...

    def prepare(self, setup: Mapping[str, JSON]) -> Results: ...

    def answer(self, header: Mapping[str, JSON], payload: bytes) -> Results: ...

    def alive(self) -> Results: ...

    def restart(self, header: Mapping[str, JSON], payload: bytes) -> Results: ...

    def finish(self, states: Mapping[str, Sequence[int]], iterations: int) -> Results: ...


@runtime_checkable
class Call(Protocol):
    """A call to one site, as nvflare's callbacks see it; `target_name` begins with the site's."""

    target_name: str


def sites(
    names: list[str],
    seconds: float,
    arrived: Callable[[Call, Received], Received] | None = None,
    wait: bool = True,
) -> Sites:
    """The sites of these names, each of which has so many seconds to answer.

    Args:
        arrived: hears of an answer when it arrives, and returns what the answer is.
        wait: whether a call comes back when all have answered; else it does at once, and its results wait when they are
            gone through, once.
    """
    return cast(Sites, collab.get_clients(names)(timeout=seconds, process_resp_cb=arrived, blocking=wait))


class Answered:
    """The results of several calls as those of one."""

    def __init__(self, calls: Sequence[Results]):
        self._found = [pair for call in calls for pair in call]
        self.failures: Mapping[str, Exception] = {
            name: error for call in calls for name, error in call.failures.items()
        }

    def __iter__(self) -> Iterator[tuple[str, Received]]:
        return iter(self._found)
