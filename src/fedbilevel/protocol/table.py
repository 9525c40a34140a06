"""The exchanges of one iteration and what they cost: a table, and the sums behind it."""

from __future__ import annotations

import dataclasses
import inspect
import io
import itertools
import json
from collections.abc import Mapping

import numpy as np
from jaxtyping import PyTree

from ..algorithm import Algorithm
from ..component import title_of
from ..federation import Way
from ..given import JSON
from .at_sites import AtSites
from .calls import named_method
from .sites import Path, Site

SAMPLED = 2_000  # draws of the server, where there are too many to enumerate
_SAME = "same round"
_WIDEST = 1_000  # characters of a line: lines are not folded
_RULE, _NONE = " -- \n", "    \n"
_RULED = f"{_NONE}{_NONE}{_RULE}{_NONE}{_NONE}{_RULE}{_NONE}{_NONE}"  # below the head and above the totals


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One line of the protocol: an exchange, and what it costs in one iteration, summed over the clients asked.

    Attributes:
        name: the client method; `down` and `up` name the message's and the reply's parts, conditional ones in brackets.
        times, bytes_down, bytes_up: expected over the server's draws.
        times_most, bytes_down_most, bytes_up_most: at most.
        combine: how each part of the reply is combined, "mean" or "maximum"; `up` names the latter.
    """

    name: str
    down: str
    up: str
    times: float
    times_most: int
    bytes_down: float
    bytes_down_most: int
    bytes_up: float
    bytes_up_most: int
    combine: tuple[Way, ...] = ("mean",)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The exchanges of one iteration; `print` it for a table.

    Attributes:
        algorithm: the algorithm's name.
        clients, cohort: how many clients there are, and how many one exchange asks, unless its line says otherwise.
        exchanges: one line per exchange in the program.
        rounds, bytes_down, bytes_up: of one iteration, expected over what the server draws (a whole number where it
            is one); bytes are payload, summed over the cohort.
        rounds_most, bytes_down_most, bytes_up_most: the most an iteration can need.
        kind: "exact", "sampled" (the server draws too many numbers to enumerate) or "bound" (the number of rounds
            depends on the data: the expected values are then the most).
        sites, info: the call sites by path and the shapes of the diagnostics, for engines.
        taken_most: the most exchanges and draws of the server together; None where that is not certain.
        each_row: what is exchanged beside iterations, once at each row of the history (`validation_loss`); not in the sums.
        rarely: what measures, in few iterations (`Federation.rarely`); not in the sums. Once in such an iteration, but
            for what takes rounds of its own: these are the first iteration's, `rounds_rarely` of them at most.
        at_sites: where leaves of x or y are kept at the sites, what these do with them.
    """

    algorithm: str
    clients: int
    cohort: int
    exchanges: tuple[Exchange, ...]
    rounds: float
    rounds_most: int
    bytes_down: float
    bytes_down_most: int
    bytes_up: float
    bytes_up_most: int
    kind: str
    sites: Mapping[Path, Site] = dataclasses.field(repr=False, compare=False)
    info: PyTree = dataclasses.field(repr=False, compare=False)
    taken_most: int | None = dataclasses.field(default=None, repr=False, compare=False)
    each_row: tuple[Exchange, ...] = ()
    rarely: tuple[Exchange, ...] = ()
    rounds_rarely: int = 0
    at_sites: AtSites | None = dataclasses.field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, JSON]:
        """Everything that can be printed, for JSON."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.compare}

    @classmethod
    def from_dict(cls, told: Mapping) -> Protocol:
        """What `to_dict` gave: it prints as it did, and knows no call sites."""
        exchange = lambda line: Exchange(**{**line, "combine": tuple(line["combine"])})
        listed = {name: tuple(map(exchange, told[name])) for name in ("exchanges", "each_row", "rarely")}
        return cls(**{**told, **listed}, sites={}, info=None)

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        note = {
            "exact": "expected values; in brackets the most, where it differs",
            "sampled": f"means over {SAMPLED} draws; in brackets the most seen",
            "bound": "the number of rounds depends on the data: these are the most",
        }[self.kind]
        title = f"{self.algorithm}: one iteration, {self.cohort} of {self.clients} clients an exchange ({note})"
        beside = [*map(_measuring, self.rarely), *map(_at_each_row, self.each_row)]
        return "\n".join([title, "", self._drawn(), *beside])

    def _drawn(self) -> str:
        """The table, as plain text."""
        from rich.box import Box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=Box(_RULED, ascii=True), show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), show_footer=True
        )
        ranges = {"times": "rounds", "bytes down": "bytes_down", "bytes up": "bytes_up"}
        totals = {title: _range(getattr(self, own), getattr(self, f"{own}_most")) for title, own in ranges.items()}
        for title in ("exchange", "down", "up"):
            table.add_column(title, footer="total" if title == "exchange" else "", no_wrap=True)
        for title, total in totals.items():
            table.add_column(title, footer=total, justify="right", no_wrap=True)
        for e in self.exchanges:
            numbers = (e.times, e.times_most), (e.bytes_down, e.bytes_down_most), (e.bytes_up, e.bytes_up_most)
            cells = e.name, e.down, e.up, *itertools.starmap(_range, numbers)
            table.add_row(*map(Text, cells))  # brackets are no markup
        drawn = io.StringIO()
        Console(file=drawn, width=_WIDEST, color_system=None).print(table)
        return "\n".join(line.rstrip() for line in drawn.getvalue().splitlines())


def _measuring(e: Exchange) -> str:
    own = not e.name.endswith(f"({_SAME})")
    rounds = f"{e.times_most} round{'s' * (e.times_most > 1)} at the start" if own else "now and then, no round"
    name = e.name if own else e.name.removesuffix(f" ({_SAME})")
    return (
        f"and measuring, {rounds}: {name}: {e.down} down, {e.up} up; {e.bytes_down_most:,} bytes down and "
        f"{e.bytes_up_most:,} up"
    )


def _at_each_row(e: Exchange) -> str:
    return (
        f"and at each row of the history {e.name}: {e.down} down, {e.up} up; {e.times_most} round, "
        f"{e.bytes_down_most:,} bytes down and {e.bytes_up_most:,} up"
    )


def bytes_of(site: Site, counts: np.ndarray, replies: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Payload bytes (down, up) over the clients asked, for counts of shape (..., 1 + flags) at a site.

    replies: the same counts summed over the clients that answered; by default the whole cohort did.
    """
    cohort = site.cohort
    counts = counts.astype(object)  # Python integers: int32 overflows, and so may int64 over a long run
    replies = cohort * counts if replies is None else replies.astype(object)
    of = lambda parts, times: sum(part.bytes * times[..., 0 if part.flag is None else 1 + part.flag] for part in parts)
    zero = 0 * counts[..., 0]
    return of(site.down, cohort * counts) + zero, of(site.up, replies) + zero


def summary(
    algorithm: Algorithm,
    clients: int,
    cohort: int,
    sites: Mapping[Path, Site],
    counts: Mapping[Path, np.ndarray],
    kind: str,
    info: PyTree,
    turns: Mapping[Path, int] | None = None,
) -> Protocol:
    """The table of an iteration from the counts of each site, (draws, 1 + flags).

    Args:
        turns: how often the loops turn at most of what happens in few iterations.
    """
    lines, rare, rounds_rarely, totals = [], [], 0, np.zeros((3, len(next(iter(counts.values())))), object)
    for path in sorted(sites):
        site, count = sites[path], counts[path]
        loop = next((loop for loop in turns or {} if path[: len(loop)] == loop), None)
        if loop is not None and turns is not None:
            count = np.full_like(count[:1], turns[loop])
            rounds_rarely += turns[loop] * site.round
        down, up = bytes_of(site, count)
        if loop is None:
            totals += np.stack([site.round * count[:, 0].astype(object), down, up])
        spent = [(_mean(each), int(each.max())) for each in (count[:, 0], down, up)]
        notes = [f"{site.cohort} asked"] * (site.cohort != cohort) + [_SAME] * (not site.round)
        name = f"{site.name} ({', '.join(notes)})" if notes else site.name
        line = Exchange(name, *_labels(algorithm, site), *itertools.chain(*spent))  # pyright: ignore[reportArgumentType]
        (lines if loop is None else rare).append(dataclasses.replace(line, combine=site.combine))
    rounds, down, up = totals
    return Protocol(
        title_of(algorithm), clients, cohort, tuple(lines),
        _mean(rounds), int(rounds.max()), _mean(down), int(down.max()), _mean(up), int(up.max()), kind, sites, info,
        rarely=tuple(rare), rounds_rarely=rounds_rarely,
    )  # fmt: skip


def _labels(algorithm: Algorithm, site: Site) -> tuple[str, str]:
    """Names of the parts: the message's from the method's signature, the reply's by their place."""
    names = list(inspect.signature(named_method(algorithm, site.name)).parameters)[1:]
    show = lambda text, part: text if part.flag is None else f"[{text}]"
    name = lambda place: names[place] if place < len(names) else f"#{place}"
    down = ", ".join(show(name(int(part.label)), part) for part in site.down)
    how = lambda way: "" if way == "mean" else f" {way}"
    up = ", ".join(show(f"{part.bytes} B{how(way)}", part) for part, way in zip(site.up, site.combine, strict=True))
    return down, up


def _mean(values: np.ndarray) -> float:
    mean = sum(int(v) for v in values) / len(values)
    return int(mean) if mean == int(mean) else mean


def _range(expected: float, most: int) -> str:
    text = f"{expected:,}" if isinstance(expected, int) else f"{expected:,.1f}"
    return text if expected == most else f"{text} [{most:,}]"


def _plain(value: str | float | tuple[Exchange, ...]) -> JSON:
    return [dataclasses.asdict(e) for e in value] if isinstance(value, tuple) else value
