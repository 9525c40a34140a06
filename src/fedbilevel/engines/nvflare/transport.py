"""Requests to the sites as nvflare's collab calls."""

from __future__ import annotations

import time

from jaxtyping import PyTree
from nvflare.fuel.f3.stats_pool import StatsPoolManager

from ...errors import InputError, RunError, warn
from ...given import Received
from ...owned import nodes, own
from ...protocol.wire import encode
from ..faults import StateLost
from ..messaging.transport import Answers, Purpose, Request, Transport
from .agreement import warnings_in
from .calls import Answered, Call, Results, sites
from .messages import Header, Restart, plain

_FIRST = 600.0  # seconds for a site's first answer of each kind, which it has to compile
_SOON = 5.0  # seconds for a sign of life
_MEGABYTE = 1024 * 1024


class CollabTransport(Transport):
    """Sites by name, in the order of their numbers."""

    def __init__(self, names: list[str]):
        self.names = names
        self.traced: dict[str, dict[str, int]] = {}  # by site, how often each client method was compiled
        self.workers: dict[str, int | None] = {}  # by site, its worker's process number
        self.compiling = 0.0  # seconds that rounds took because a site compiled
        self._seen: set[tuple[int, Purpose, int]] = set()
        self._late: set[int] = set()  # who did not answer when they were asked last: nobody waits longer for them

    def ask(self, requests: dict[int, Request], deadline: float | None) -> Answers:
        answers, began = Answers(), time.perf_counter()
        if not requests:
            return answers
        one = next(iter(requests.values()))
        new = any((client, one.purpose, one.place) not in self._seen for client in requests if client not in self._late)
        seconds = _FIRST if new or deadline is None else deadline
        states = {self.names[client]: (request.counted, request.kept) for client, request in requests.items()}
        header = plain(Header(one.place, one.tag, one.sent, one.wanted, states, float(seconds), one.purpose))
        number = {self.names[client]: client for client in requests}

        def arrived(call: Call, said: Received, **_: Received) -> Received:
            answers.seconds[number[call.target_name.split(".")[0]]] = time.perf_counter() - began
            return said

        def all_at_once() -> Results:
            if all(request.payload == one.payload for request in requests.values()):
                return sites(list(number), float(seconds), arrived).answer(header, one.payload)
            apart = lambda name: sites([name], float(seconds), arrived, wait=False)  # each is sent blocks of its own
            return Answered([apart(name).answer(header, requests[number[name]].payload) for name in number])

        results = all_at_once()
        self.compiling += max((compiled(said) for _, said in results), default=0.0)
        for name, said in results:
            client = number[name]
            error = refusal(name, said)
            if error is not None or not isinstance(said, dict):
                answers.failures[client] = error or no_answer(name, said)
            elif not isinstance(said.get("numbers"), bytes):
                answers.failures[client] = RunError(f"site {name} answered without numbers")
            else:
                answers.replies[client] = said["numbers"]
                self._seen.add((client, one.purpose, one.place))
                self._late.discard(client)
                for sentence in warnings_in(said):
                    warn(f"{name}: {sentence}")
                if isinstance(said.get("traced"), dict):
                    self.traced[name] = said["traced"]
                if said.get("worker") != self.workers.get(name):
                    self.workers[name] = said.get("worker")
                    answers.restarted.add(client)
        for name, error in results.failures.items():
            answers.failures[number[name]] = error
            self._late.add(number[name])
        return answers

    def there(self, client: int) -> bool:
        # a site whose process is gone does not answer; one that is busy with a call that nobody waits for does, later
        return any(True for _ in sites([self.names[client]], _SOON).alive())

    def restart(self, x: PyTree, y: PyTree, purpose: Purpose) -> None:
        header, mine = plain(Restart(purpose)), bool(nodes((x, y)))  # a site is sent its own blocks
        for index, names in enumerate([[name] for name in self.names] if mine else [self.names]):
            payload = encode(own((x, y), index), (True, True))
            for name, said in sites(names, _FIRST).restart(header, payload):
                error = refusal(name, said)
                if error is not None:
                    raise error

    def travelled(self) -> tuple[int, int]:
        sent, received = (_total(pool) for pool in ("Sent_Msg_Sizes", "Received_Msg_Sizes"))
        return sent, received


def compiled(said: Received) -> float:
    """Seconds that a site says it compiled."""
    value = said.get("compiling", 0.0) if isinstance(said, dict) else 0.0
    return float(value) if isinstance(value, (int, float)) and 0 <= value < _FIRST else 0.0


def refusal(name: str, said: Received) -> Exception | None:
    """The error that a site's answer tells of, if it does."""
    if not isinstance(said, dict):
        return no_answer(name, said)
    if "error" not in said:
        return None
    kinds = {"lost": StateLost, "input": InputError}
    return kinds.get(said.get("kind", ""), RunError)(f"{name}: {said['error']}")


def no_answer(name: str, said: Received) -> RunError:
    """The error of an answer that is none of a site's."""
    return RunError(f"site {name} answered with a {type(said).__name__}")


def _total(kind: str) -> int:
    """Bytes of all message bodies so far, as nvflare's own statistics have them."""
    total = 0.0
    for name, pool in list(StatsPoolManager.pools.items()):
        if kind.lower() in name.lower():
            total += sum(bin.total for bins in list(pool.cat_bins.values()) for bin in bins if bin)
    return round(total * _MEGABYTE)
