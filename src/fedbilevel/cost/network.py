"""The network between a server and its clients, in numbers: what a round waits, and how fast payload travels.

`NETWORKS` holds assumptions, not facts: round figures to start from. Replace them by measurements of your own.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from ..errors import check, unknown_name

TIMES = {"ms": 1e-3, "s": 1.0, "min": 60.0}  # in seconds
RATES = {  # in bits a second; written with or without /s
    "kbit": 1e3,
    "Mbit": 1e6,
    "Gbit": 1e9,
    "kB": 8e3,
    "MB": 8e6,
    "GB": 8e9,
}
ALL = "all"
GIVEN = "this network"  # what a network is called that came as numbers
_AMOUNT = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]+)\s*")
_SPANS = ((1.0, 1e-3, "ms"), (120.0, 1.0, "s"), (120 * 60.0, 60.0, "min"), (48 * 3600.0, 3600.0, "h"))


@dataclasses.dataclass(frozen=True)
class Network:
    """What a round costs.

    Attributes:
        latency: seconds that a round takes beyond transfer and computation: the way there and back, scheduling, and the
            wait for the slowest client.
        up, down: bits a second of ONE client's link, from it and to it. Clients send at the same time.
        server_up, server_down: bits a second of the server's own link, from it and to it: the payload of a whole cohort
            passes it. By default it holds nobody up.
    """

    latency: float
    up: float
    down: float
    server_up: float = math.inf
    server_down: float = math.inf

    def __post_init__(self):
        good = 0 <= self.latency < math.inf
        check(good, f"latency= is the seconds a round takes beyond all else, 0 or more; got {self.latency!r}.")
        for name in ("up", "down", "server_up", "server_down"):
            rate = getattr(self, name)
            check(rate > 0, f"{name}= is a link's bits a second, above 0; got {rate!r}.")

    def __str__(self) -> str:
        text = f"{duration(self.latency)} a round, {rate_text(self.up)} up, {rate_text(self.down)} down"
        for name in ("server_up", "server_down"):
            rate = getattr(self, name)
            text += f", server {rate_text(rate)} {name.removeprefix('server_')}" if rate < math.inf else ""
        return text


NETWORKS: Mapping[str, Network] = {
    "data-centre": Network(latency=0.005, up=10e9, down=10e9),
    "hospitals": Network(latency=0.1, up=100e6, down=100e6),  # organisations on a wide-area network
    "home-broadband": Network(latency=0.2, up=20e6, down=100e6),
    "mobile-4g": Network(latency=0.5, up=5e6, down=20e6),
}


def amount(what: str, text: str, units: Mapping[str, float]) -> float:
    """`"5Mbit"` -> 5e6: a number and one of the `units`, which are case-sensitive.

    Args:
        what: what it is, for the error.
        units: `TIMES` (to seconds) or `RATES` (to bits a second; they may end in /s).

    Raises:
        InputError: anything else.
    """
    kind, example = ("a time", "200ms, 0.2s or 1min") if units is TIMES else ("a rate", "500kbit, 5Mbit/s or 20MB/s")
    found = _AMOUNT.fullmatch(text if units is TIMES else text.strip().removesuffix("/s"))
    good = found is not None and found[2] in units
    check(good, f"{what} takes {kind} with its unit ({', '.join(units)}), as in {example}; got {text!r}.")
    assert found is not None
    return float(found[1]) * units[found[2]]


def choose(
    name: str | None,
    latency: str | None = None,
    up: str | None = None,
    down: str | None = None,
    server_up: str | None = None,
    server_down: str | None = None,
) -> dict[str, Network]:
    """The networks that words of the command line stand for, by name.

    Args:
        name: one of `NETWORKS`, or "all"; None if the numbers are given instead.
        latency, up, down: the numbers with their units; None if there is a name.
        server_up, server_down: the server's own link, on every network chosen.

    Raises:
        InputError: neither a name nor all three numbers, both, an unknown name, or a number without its unit.
    """
    numbers = {"--latency": latency, "--up": up, "--down": down}
    given = [option for option, text in numbers.items() if text is not None]
    if name is None:
        missing = [option for option in numbers if option not in given]
        known = ", ".join([*NETWORKS, ALL])
        check(not missing, f"{' and '.join(missing)} missing: give --latency, --up and --down, or --network ({known}).")
        rate = lambda option: amount(option, str(numbers[option]), RATES)
        chosen = {GIVEN: Network(amount("--latency", str(latency), TIMES), rate("--up"), rate("--down"))}
    else:
        check(not given, f"give --network or {' and '.join(given)}, not both.")
        if name not in (*NETWORKS, ALL):
            raise unknown_name("network", name, (*NETWORKS, ALL))
        chosen = dict(NETWORKS) if name == ALL else {name: NETWORKS[name]}
    server = {"server_up": server_up, "server_down": server_down}
    link = {k: amount(f"--{k.replace('_', '-')}", v, RATES) for k, v in server.items() if v is not None}
    return {k: dataclasses.replace(network, **link) for k, network in chosen.items()}


def span(seconds: float) -> tuple[float, str]:
    """(seconds in it, name) of the unit in which such a time is read."""
    return next(((size, unit) for end, size, unit in _SPANS if seconds < end), (86400.0, "days"))


def duration(seconds: float) -> str:
    """A time in words, "12 min" or "2.1 h"; "never" if it is not finite."""
    if not math.isfinite(seconds):
        return "never"
    size, unit = span(seconds) if seconds else (1.0, "s")
    return f"{_short(seconds / size)} {unit}"


def rate_text(rate: float) -> str:
    """A rate in words: "5 Mbit/s"."""
    size, unit = next(
        ((size, unit) for size, unit in ((1e9, "Gbit/s"), (1e6, "Mbit/s")) if rate >= size), (1e3, "kbit/s")
    )
    return f"{rate / size:g} {unit}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"
