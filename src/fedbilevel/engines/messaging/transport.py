"""What travels between the two halves of an engine that sends messages, and the interface of what carries it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal, SupportsInt

import jax
from jaxtyping import Array, Key, PyTree

from ...cohorts import exchange_key


@dataclasses.dataclass(frozen=True)
class Purpose:
    """What an exchange is for: which of the programs that server and clients both know it belongs to.

    Attributes:
        name: the run's own program, what is asked at a row of the history (`validation`), or the scores of candidates
            that race (`race.scoring`).
        left: of a race, who is left of the candidates; nobody where there is no race.
        turns: of training before candidates are judged.
        loss, clients: whether a validation asks for the outer loss, and for the clients' metrics.
    """

    name: Literal["run", "validation", "scoring"] = "run"
    left: tuple[int, ...] = ()
    turns: int = 0
    loss: bool = True
    clients: bool = False


RUN = Purpose()
Tag = tuple[int, int, int]  # iteration, exchange, attempt: in the order in which things happen
START: Tag = (-1, 0, 0)  # the tag of the state that a client starts with


@dataclasses.dataclass(frozen=True)
class Request:
    """One exchange, as one client is asked.

    Attributes:
        place: which exchange of the protocol: its place among the protocol's sites, in order.
        tag: iteration, exchange within it, and attempt; they decide the client's random key.
        sent, wanted: which conditional parts of the message are there, and which parts of the reply are wanted.
        counted, kept: tags of the client's latest reply that counted, and of the one that had counted where the run could
            be resumed from: what is older can be forgotten.
        payload: the message's numbers.
        purpose: which protocol that is.
    """

    place: int
    tag: Tag
    sent: tuple[bool, ...]
    wanted: tuple[bool, ...]
    counted: Tag
    kept: Tag
    payload: bytes
    purpose: Purpose = RUN


@dataclasses.dataclass
class Answers:
    """What came back from an exchange.

    Attributes:
        replies: by client, the reply's numbers as bytes.
        failures: by client, why there are none.
        seconds: by client, how long it took, where that is known.
        restarted: clients whose process had died since their last answer and was started again.
    """

    replies: dict[int, bytes] = dataclasses.field(default_factory=dict)
    failures: dict[int, Exception] = dataclasses.field(default_factory=dict)
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)
    restarted: set[int] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True)
class Round:
    """One attempt at an exchange, as it went.

    Attributes:
        iteration, attempt: from one on; exchange: the client method.
        asked, replied: clients' numbers; failed: by client, why.
        restarted: clients whose process had died since their last answer and was started again.
        latency: by client, seconds until its reply was there, where that is known.
        bytes_down, bytes_up: payload; wire_down, wire_up: what really travelled, where that is known.
    """

    iteration: int
    exchange: str
    attempt: int
    asked: tuple[int, ...]
    replied: tuple[int, ...]
    failed: Mapping[int, str]
    restarted: tuple[int, ...]
    latency: Mapping[int, float]
    seconds: float
    bytes_down: int
    bytes_up: int
    wire_down: int | None
    wire_up: int | None


def as_tag(numbers: Iterable[SupportsInt]) -> Tag:
    """A tag from three whole numbers."""
    iteration, exchange, attempt = map(int, numbers)
    return iteration, exchange, attempt


class Transport(abc.ABC):
    """Carries requests to clients and replies back."""

    @abc.abstractmethod
    def ask(self, requests: dict[int, Request], deadline: float | None) -> Answers:
        """Ask clients, all at once; comes back when all have answered or failed, or the deadline has passed."""

    @abc.abstractmethod
    def restart(self, x: PyTree, y: PyTree, purpose: Purpose) -> None:
        """Have all clients begin anew with the state `client_init(x, y)` of the program with that purpose."""

    def there(self, client: int) -> bool:
        """Whether a client that failed before can be asked again."""
        return True

    def travelled(self) -> tuple[int, int] | None:
        """(bytes really sent, bytes really received) so far, where that is known."""
        return None


def attempt_key(base: Key[Array, ""], tag: Tag) -> Key[Array, ""]:
    """The key of an attempt at an exchange: at first a simulation's, for another attempt a fresh one."""
    key = exchange_key(jax.random.fold_in(base, tag[0]), tag[1])
    return key if tag[2] == 0 else jax.random.fold_in(key, 2**32 - 1 - tag[2])
