"""The protocol as a picture: who sends what in which round of one iteration, and what it takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from ..protocol.table import Exchange, Protocol
from .found import Found
from .markup import dim, folded, size, text

_WIDTH, _SERVER, _CLIENTS = 800, 150, 560  # of a picture, and where its two lines stand
_LETTERS = 58  # that fit between them
_LINE, _ROOM = 15, 26  # height of a line of words, and what separates two messages
_SUMS = ("rounds", "rounds_most", "bytes_down", "bytes_down_most", "bytes_up", "bytes_up_most")
_NOTES = re.compile(r" \((?:(\d+) asked)?(?:, )?(same round)?\)$")


def exchanges(found: Found) -> str:
    """The part of the page: a picture for each algorithm."""
    drawn = []
    for name, runs in found.algorithms.items():
        told = next((run.head["protocol"] for run in runs if run.head.get("protocol")), None)
        drawn.append((name, _read(told)))
    known = [(name, protocol) for name, protocol in drawn if protocol is not None]
    lost = [name for name, protocol in drawn if protocol is None]
    parts = [dim(f"not told: {', '.join(lost[:6])} (no result.json of a run that ended).")] if lost else []
    if len(known) == 1 and not lost:
        return _one(known[0][1])
    parts += [folded(name, _one(protocol), unfolded=k < 2) for k, (name, protocol) in enumerate(known)]
    return "".join(parts) or dim("not told.")


def _read(told: object) -> Protocol | None:
    if not isinstance(told, dict) or not all(isinstance(told.get(name), int | float) for name in _SUMS):
        return None
    try:
        return Protocol.from_dict(told)
    except (KeyError, TypeError, ValueError):  # of another version
        return None


def _one(protocol: Protocol) -> str:
    """A protocol: its sums in a line, the picture, and the table as `print` has it."""
    try:
        sums = [
            _range(protocol.rounds, protocol.rounds_most, _plain) + " round" + "s" * (protocol.rounds_most != 1),
            _range(protocol.bytes_down, protocol.bytes_down_most, size) + " down",
            _range(protocol.bytes_up, protocol.bytes_up_most, size) + " up",
        ]
        kind = {"exact": "expected, in brackets the most", "sampled": "means of draws, in brackets the most seen"}
        one = f"one iteration: {', '.join(sums)}; in grey: over all clients asked"
        note = kind.get(protocol.kind, "the most: the number of rounds depends on the data")
        head = dim(one + (f"; {note}" if protocol.kind == "bound" or "[" in one else "") + ".")
        return head + picture(protocol) + folded("as a table", f"<pre>{_lines(str(protocol))}</pre>")
    except (KeyError, TypeError, ValueError, AttributeError):  # numbers that are none
        return dim("not told: result.json is of another version.")


def _lines(table: str) -> str:
    return "\n".join(map(text, table.splitlines()))


def _range(expected: float, most: float, say: Callable[[float], str]) -> str:
    return say(expected) if expected == most else f"{say(expected)} [{say(most)}]"


def picture(protocol: Protocol) -> str:
    """Server and clients as two lines, messages as arrows between them, rounds at the left."""
    drawn, y, number = [], 52, 1
    for e in protocol.exchanges:
        asked, same = _notes(e)
        once = e.times == e.times_most == 1
        if same:
            label = "same round" if once else f"same round, {_times(e)}"
        else:
            label = f"round {number}" if once and number else ("1 round" if once else f"{_times(e)} rounds")
            number = number + 1 if once and number else 0  # after a loop the number is not known
        part, y = _exchange(e, y, label, asked)
        drawn.append(part)
    for e in protocol.rarely:
        asked, same = _notes(e)
        own = f"{e.times_most} at the start" if not same else "now and then"
        part, y = _exchange(e, y, own, asked, "measuring")
        drawn.append(part)
    for e in protocol.each_row:
        asked = protocol.clients if protocol.clients != protocol.cohort else 0
        part, y = _exchange(e, y, f"{e.times_most} round", asked, "each row")
        drawn.append(part)
    heads = (
        f'<text class="b" x="{_SERVER}" y="20" text-anchor="middle">server</text>'
        f'<text class="b" x="{_CLIENTS}" y="20" text-anchor="middle">{_whom(protocol)}</text>'
        f'<path class="axis" d="M{_SERVER} 28V{y}M{_CLIENTS} 28V{y}"/>'
    )
    told = f"{protocol.algorithm}: messages of one iteration"
    view = f'viewBox="0 0 {_WIDTH} {y + 8}" style="max-width:{_WIDTH}px" role="img" aria-label="{text(told)}"'
    return f'<div class="wide"><svg class="figure" {view}>{heads}{"".join(drawn)}</svg></div>'


def _whom(protocol: Protocol) -> str:
    some = protocol.cohort < protocol.clients
    return f"{protocol.cohort:,} of {protocol.clients:,} clients" if some else f"{protocol.clients:,} clients"


def _notes(e: Exchange) -> tuple[int, bool]:
    """How many clients it asks, 0 for a cohort, and whether it shares the round of the one before."""
    found = _NOTES.search(e.name)
    return (0, False) if found is None else (int(found[1] or 0), found[2] is not None)


def _times(e: Exchange) -> str:
    return _range(e.times, e.times_most, _plain)


def _plain(count: float) -> str:
    return f"{count:,}" if count == int(count) else f"{count:,.1f}"


def _exchange(e: Exchange, y: int, label: str, asked: int, beside: str = "") -> tuple[str, int]:
    """An exchange from a height on: the message, what clients do, the reply; and the height below it."""
    middle, start = (_SERVER + _CLIENTS) / 2, y
    drawn = []
    paid = (e.bytes_down, e.bytes_down_most), (e.bytes_up, e.bytes_up_most)
    for k, (parts, (spent, most)) in enumerate(zip((e.down, e.up), paid, strict=True)):
        for words in _wrapped(parts or "nothing"):
            drawn.append(f'<text x="{middle:.0f}" y="{y}" text-anchor="middle">{text(words)}</text>')
            y += _LINE
        y -= _LINE - 6
        ends = (_SERVER + 3, _CLIENTS - 3) if k == 0 else (_CLIENTS - 3, _SERVER + 3)
        tip = -7 if k == 0 else 7
        drawn.append(f'<path class="arrow{" reply" * k}" d="M{ends[0]} {y}H{ends[1]}"/>')
        drawn.append(f'<path class="tip" d="M{ends[1]} {y}l{tip} -4v8z"/>')
        drawn.append(
            f'<text class="dim" x="{middle:.0f}" y="{y + 14}" text-anchor="middle">{_range(spent, most, size)}</text>'
        )
        y += _LINE + _ROOM
    foot = y - _LINE - _ROOM
    name = _NOTES.sub("", e.name)
    drawn.append(f'<rect class="box" x="{_CLIENTS - 3}" y="{start}" width="6" height="{foot - start}"/>')
    height = (start + foot) / 2 + 4
    drawn += [
        f'<text x="{_CLIENTS + 14}" y="{height + _LINE * k:.0f}">{text(line)}</text>'
        for k, line in enumerate(_wrapped(name, 34))
    ]
    if asked:
        drawn.append(f'<text class="dim" x="{_CLIENTS + 14}" y="{height - _LINE:.0f}">{asked:,} asked</text>')
    drawn.append(f'<path class="box" d="M{_SERVER - 14} {start}h-5V{foot}h5"/>')
    for k, line in enumerate([*([beside] if beside else []), label]):
        drawn.append(
            f'<text class="dim" x="{_SERVER - 26}" y="{height + _LINE * k:.0f}" text-anchor="end">{text(line)}</text>'
        )
    return "".join(drawn), y


def _wrapped(words: str, letters: int = _LETTERS) -> Sequence[str]:
    """Words in lines that fit, cut after commas where they can be; six lines at most."""
    lines = [""]
    for word in re.split(r"(?<=, )", words):
        if lines[-1] and len(lines[-1]) + len(word.rstrip()) > letters:
            lines.append("")
        lines[-1] += word
    lines = [line if len(line) <= letters + 2 else line[: letters - 3] + "..." for line in map(str.strip, lines)]
    return lines if len(lines) <= 6 else [*lines[:5], f"and {len(lines) - 5} more lines, in the table below"]
