"""rounds.csv: one line for each attempt at an exchange."""

from __future__ import annotations

import csv
from pathlib import Path

from ..messaging.transport import Round

COLUMNS = (
    "iteration", "exchange", "attempt", "asked", "replied", "failed", "restarted", "latency", "seconds",
    "bytes_down", "bytes_up", "wire_down", "wire_up",
)  # fmt: skip


class Ledger:
    """Writes rounds as they happen.

    iteration, attempt: from one on. asked, replied: sites. failed: site (why); ... . restarted: sites whose worker had died
    since its last answer and was started again. latency: of each reply, in the order of `replied`, in seconds. bytes:
    payload of the protocol. wire: what nvflare's messages to and from the sites weighed, without the transport's own
    framing and encryption.
    """

    def __init__(self, path: Path, names: list[str], resume: bool):
        self._names = names
        goes_on = resume and path.is_file()
        self._file = path.open("a" if goes_on else "w", newline="")
        self._writer = csv.writer(self._file)
        if not goes_on:
            self._writer.writerow(COLUMNS)

    def write(self, r: Round) -> None:
        """One line."""
        failed = "; ".join(f"{self._names[client]} ({why})" for client, why in sorted(r.failed.items()))
        sites = lambda clients: " ".join(self._names[client] for client in clients)
        latency = " ".join(f"{r.latency.get(client, float('nan')):.4f}" for client in r.replied)
        self._writer.writerow(
            [r.iteration, r.exchange, r.attempt, sites(r.asked), sites(r.replied), failed, sites(r.restarted), latency,
             f"{r.seconds:.4f}", r.bytes_down, r.bytes_up, r.wire_down, r.wire_up]
        )  # fmt: skip
        self._file.flush()

    def close(self) -> None:
        """The run is over."""
        self._file.close()
