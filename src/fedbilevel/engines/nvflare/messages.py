"""What server, sites and workers tell each other: each message is one struct, and is checked where it is read.

A message that comes from another process is refused in a sentence of its own, whatever is wrong with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, TypeVar

import msgspec
from msgspec import Meta, Struct

from ...algorithm import Setting
from ...given import JSON, Received
from ...tune.entrants import MOST
from ..messaging.transport import RUN, Purpose, Request

_MOST_FLAGS, _MOST_NAMES = 1000, 100_000  # in a request; files or packages of an app
_TAG = "a tag is three whole numbers"
_FLAGS = "flags are true or false"

Whole = Annotated[int, Meta(ge=-1, lt=2**53)]
Count = Annotated[int, Meta(ge=0, lt=2**53)]
Tag = tuple[Whole, Whole, Whole]
Flags = Annotated[tuple[bool, ...], Meta(max_length=_MOST_FLAGS)]
Names = Annotated[dict[str, str], Meta(max_length=_MOST_NAMES - 1)]
Versions = Annotated[dict[str, str | None], Meta(max_length=_MOST_NAMES - 1)]
Rows = Annotated[int, Meta(gt=0)]
Words = Annotated[str, Meta(max_length=2**26)]  # of tables: read where it is known what they are about

Message = TypeVar("Message", bound=Struct)


# The server to a site ---------------------------------------------------------------------------------------------------


class Header(Struct, frozen=True, forbid_unknown_fields=True):
    """A request to several sites at once; `states` has two tags for each, of what counted and of what is kept."""

    place: Count
    tag: Tag
    sent: Flags
    wanted: Flags
    states: dict[str, tuple[Tag, Tag]]
    deadline: Annotated[float, Meta(gt=0, le=1e6)]
    purpose: Purpose = RUN

    sentences: ClassVar[Mapping[str, str]] = {
        r"\.place": "a place is a whole number",
        r"\.tag": _TAG,
        r"\.(sent|wanted)": _FLAGS,
        r"\.states\[\.\.\.\]\[": _TAG,
        r"\.states": "states has two tags for each site",
        r"\.deadline": "a deadline is a number of seconds",
        r"\.purpose": "a purpose is of the run, of validation or of scoring",
        "": "a header has {fields}",
    }


class Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """A candidate that is named: its label, its algorithm ("" for the application's own), its settings beside."""

    label: str
    kind: str
    settings: dict[str, Setting]


class Racing(Struct, frozen=True, forbid_unknown_fields=True):
    """Who races: so many of these, or of `tune`'s own candidates with minibatches of that size."""

    many: Annotated[int, Meta(ge=1, le=MOST)]
    batch_size: Annotated[int, Meta(ge=1)] | None = None
    entries: Annotated[tuple[Entry, ...], Meta(max_length=MOST)] | None = None


class Asked(Struct, frozen=True, forbid_unknown_fields=True):
    """How to tune, as the server is told when a job begins; `metric` as in "test_loss:min"."""

    metric: str | None = None
    candidates: Annotated[int, Meta(ge=1, le=MOST)] | None = None
    batch_size: Annotated[int, Meta(ge=1)] | None = None
    max_bytes: Annotated[int, Meta(ge=1)] | None = None
    entries: Annotated[tuple[Entry, ...], Meta(min_length=1, max_length=MOST)] | None = None

    sentences: ClassVar[Mapping[str, str]] = {
        "": f"tuning says how many race (1 to {MOST}), who, by which metric, with how many rows, for how many bytes"
    }


class Setup(Struct, frozen=True, forbid_unknown_fields=True):
    """What all sites are to prepare for: their order, and what their outer rows' weights sum to, if not one."""

    order: tuple[str, ...]
    cohort: Count
    seed: Count
    scales: tuple[float, ...] | None
    protocol: str
    resume: bool
    check: bool = False
    racing: Racing | None = None
    prepared: Words | None = None

    sentences: ClassVar[Mapping[str, str]] = {
        r"\.order": "the order of the sites names this one",
        r"\.(cohort|seed)": "cohort and seed are whole",
        r"\.scales": "scales are numbers, one for each site",
        r"\.(protocol|resume)": "protocol is text, resume a bool",
        r"\.check": "check is true or false",
        r"\.racing": "racing says how many race, and who",
        r"\.prepared": "how tables become rows is text",
        "": "a setup has {fields}",
    }


# A site to its worker ---------------------------------------------------------------------------------------------------


class Load(Struct, frozen=True, forbid_unknown_fields=True):
    """Load this site's rows."""


class Prepare(Struct, frozen=True, forbid_unknown_fields=True):
    """Get ready, as the site of this index among so many.

    `scale` is what its outer rows' weights sum to, if not one; `prepared` how its tables become rows, if they do.
    """

    index: Count
    sites: Count
    cohort: Count
    seed: Count
    scale: float | None
    protocol: str
    resume: bool
    check: bool = False
    racing: Racing | None = None
    prepared: Words | None = None


class Measure(Struct, frozen=True, forbid_unknown_fields=True):
    """What all sites' tables have in common: measure those columns of this one's."""

    agreed: Words

    sentences: ClassVar[Mapping[str, str]] = {"": "what tables have in common is text"}


class Answer(Struct, frozen=True, forbid_unknown_fields=True):
    """A `Request`, but for its numbers."""

    place: Count
    tag: Tag
    sent: Flags
    wanted: Flags
    counted: Tag
    kept: Tag
    purpose: Purpose = RUN

    def request(self, payload: bytes) -> Request:
        """With its numbers."""
        return Request(**msgspec.structs.asdict(self), payload=payload)


class Restart(Struct, frozen=True, forbid_unknown_fields=True):
    """Begin anew, with the program of that purpose."""

    purpose: Purpose = RUN

    sentences: ClassVar[Mapping[str, str]] = {"": "a restart says of which program"}


class Finish(Struct, frozen=True, forbid_unknown_fields=True):
    """The run is over after so many iterations, and the state of this tag counts."""

    counted: Tag
    iterations: int = 0

    sentences: ClassVar[Mapping[str, str]] = {r"\.iterations": "iterations are a whole number", "": _TAG}


# A site to the server ---------------------------------------------------------------------------------------------------


class Described(Struct, frozen=True):
    """What a site says of itself."""

    files: Names
    packages: Versions
    optional: Versions
    rows: tuple[str, str]
    worker: Rows
    counts: tuple[Rows, Rows] | None = None
    tables: Words | None = None


# Reading ----------------------------------------------------------------------------------------------------------------


def read(message: Received, kind: type[Message], refused: Callable[[str], Exception], name: str) -> Message:
    """A message as a struct.

    Args:
        refused: makes the error of a sentence.
        name: what the message is called, "a header".
    """
    try:
        return msgspec.convert(message, kind)
    except msgspec.ValidationError as error:
        if not isinstance(message, dict):
            raise refused(f"{name} is a dict") from None
        raise refused(_sentence(kind, str(error))) from None


def plain(message: Struct) -> dict[str, JSON]:
    """A message as what JSON can say."""
    return msgspec.json.decode(msgspec.json.encode(message))


def _sentence(kind: type[Struct], error: str) -> str:
    """What to say of what msgspec found, which names the place as in `$.states[...][0]`."""
    sentences: Mapping[str, str] = getattr(kind, "sentences", {"": error})
    found = next(text for place, text in sentences.items() if not place or re.search(r"\$" + place, error))
    needed = [field.name for field in msgspec.structs.fields(kind) if field.required]
    return found.format(fields=", ".join(sorted(needed)))
