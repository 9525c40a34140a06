"""The first exchange: which columns there are, what they hold, and which categories clients have in common.

A category is known by a digest until the clients are asked for the texts of those that are kept.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError, RunError, check
from ..rows.values import Whose, columns_apart, shown
from .columns import BOOLEAN, CATEGORY, EMPTY, NUMBER, check_dates, check_named, check_numbers, kind_of, texts_of
from .wanted import CATEGORIES, FREQUENT, Prepare

if TYPE_CHECKING:
    import pandas

MOST = 1000  # categories of a column, or values of one that the most frequent fills
WHOLE, REAL, CLASSES = "whole numbers", "numbers", "classes"  # what a label is


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a client says of a column.

    Attributes:
        kind: numbers, booleans, categories, or nothing.
        counts: of each category, by its digest, how many inner rows have it.
    """

    name: str
    kind: str
    counts: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Described:
    """What a client says of its table.

    Attributes:
        columns: its columns, but for the label and those that are dropped.
        label: what the label is; "" where there is none.
        classes: of a label of text, those that the client has.
    """

    columns: tuple[Seen, ...]
    label: str = ""
    classes: tuple[str, ...] = ()

    def text(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def read(cls, text: str, client: str) -> Described:
        """What `text` says.

        Raises:
            RunError: it says something else.
        """
        with unreadable(client):
            told = json.loads(text)
            columns = tuple(
                Seen(str(c["name"]), str(c["kind"]), {str(k): whole(n) for k, n in c["counts"].items()})
                for c in told["columns"]
            )
            return cls(columns, str(told["label"]), tuple(map(str, told["classes"])))


class unreadable:  # noqa: N801  read like a function
    """Within it, whatever is wrong with what a client said is that client's."""

    def __init__(self, client: str):
        self.client = client

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None and issubclass(kind, (ValueError, TypeError, KeyError, AttributeError, RecursionError)):
            raise RunError(f"{self.client} described its table in a way that cannot be read: {error!r}.") from None


def whole(number: object) -> int:
    """A number of rows.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**53:
        raise ValueError(f"{shown(number)} rows")
    return number


def digest(column: str, text: str) -> str:
    """What stands for a category's text."""
    return hashlib.sha256(json.dumps([column, text]).encode()).hexdigest()[:32]


def describe(inner: pandas.DataFrame, outer: pandas.DataFrame, wanted: Prepare, client: str) -> Described:
    """What a client says of its table, from its inner rows alone but for the label's classes.

    Raises:
        InputError: the table lacks a column that is named, a column holds what cannot be used, or a label is missing.
    """
    import pandas

    whose = Whose(client, "inner rows")
    for argument, name in wanted.named:
        check_named([name], list(inner.columns), client, argument)
    check(len(inner) > 0, f"{client} has no inner rows: give it at least one.")
    columns = tuple(
        _seen(inner[name], wanted, whose, name)
        for name in inner.columns
        if name != wanted.label and name not in wanted.drop
    )
    check(columns, f"{client} has no column left beside the label and what is dropped.")
    if wanted.label is None:
        return Described(columns)
    for frame, level in ((inner, "inner"), (outer, "outer")):
        check_named([wanted.label], list(frame.columns), client, "label")
        check_labels(frame[wanted.label], Whose(client, f"{level} rows"), wanted.label)
    labels = pandas.concat([frame[wanted.label] for frame in (inner, outer) if len(frame)])
    return Described(columns, *_label(labels, wanted, Whose(client, "rows")))


def _seen(column: pandas.Series, wanted: Prepare, whose: Whose, name: str) -> Seen:
    kind = kind_of(column, whose, name)
    code = name in wanted.categories and kind in (NUMBER, BOOLEAN)
    kind = CATEGORY if code else kind
    counted = kind == CATEGORY or (kind == NUMBER and wanted.fill_of(name) == FREQUENT)
    if not counted:
        return Seen(name, kind, {})
    codes, texts = texts_of(column, whose, name)
    if name not in wanted.categories:
        check_dates(texts, whose, name)
        if kind == CATEGORY:
            check_numbers(texts, whose, name)
    if len(texts) > MOST:
        hint = (
            f"leave it out with drop=[{name!r}], or make numbers or fewer categories of it"
            if kind == CATEGORY
            else "fill it in with its mean or a number"
        )
        raise whose.refusal(f"{len(texts):,} different values", f", column {name!r}", hint)
    counts = np.bincount(codes[codes >= 0], minlength=len(texts))
    told = {digest(name, text): int(n) for text, n in zip(texts, counts, strict=True)}
    return Seen(name, kind, dict(sorted(told.items())))  # the order of rows or of texts tells nothing


def _label(column: pandas.Series, wanted: Prepare, whose: Whose) -> tuple[str, tuple[str, ...]]:
    name = str(wanted.label)
    kind = kind_of(column, whose, name)
    if kind == CATEGORY or wanted.classes is not None:
        texts = sorted(texts_of(column, whose, name).texts)
        if wanted.classes is not None:  # nothing of them needs to travel
            _known(texts, wanted.classes, whose, name)
            return CLASSES, ()
        if len(texts) > MOST:
            hint = "make numbers or fewer classes of it"
            raise whose.refusal(f"{len(texts):,} different texts", f", the label {name!r}", hint)
        return CLASSES, tuple(texts)
    return (WHOLE if column.dtype.kind in "biu" or kind == BOOLEAN else REAL), ()


def check_labels(column: pandas.Series, whose: Whose, name: str) -> None:
    """Refuse labels that are missing."""
    missing = column.isna().to_numpy()
    if missing.any():
        what = f"{int(missing.sum())} missing labels (the first in row {column.index[int(missing.argmax())]})"
        raise whose.refusal(what, f", column {name!r}", "fill them in, or drop those rows")


def _known(texts: list[str], classes: object, whose: Whose, name: str) -> None:
    unknown = [text for text in texts if text not in tuple(classes)]  # pyright: ignore[reportArgumentType]
    if unknown:
        what = f"the label {shown(unknown[0])}"
        raise whose.refusal(what, f", column {name!r}", f"it is none of the classes {list(classes)}")  # pyright: ignore


# What comes of all clients' words ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Common:
    """A column that all clients have.

    Attributes:
        kind: numbers, booleans or categories.
        kept: digests of the categories that stay, whose texts clients are asked for.
        counts: of those, how many inner rows of all clients have each; the server keeps them.
    """

    name: str
    kind: str
    kept: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Agreed:
    """What all clients' tables have in common; clients are told it in the second exchange.

    Attributes:
        common: the columns, in the order of the first client's table, by its name.
        label, classes: as `Described`, of all.
    """

    common: tuple[Common, ...]
    label: str = ""
    classes: tuple[str, ...] = ()

    def text(self) -> str:
        """As JSON, without the numbers of rows."""
        columns = [[column.name, column.kind, list(column.kept)] for column in self.common]
        return json.dumps([columns, self.label, list(self.classes)], separators=(",", ":"))

    @classmethod
    def read(cls, text: str) -> Agreed:
        """What `text` says.

        Raises:
            RunError: it says something else.
        """
        with unreadable("the server"):
            columns, label, classes = json.loads(text)
            kept = lambda digests: tuple(map(str, digests))
            every = tuple(Common(str(name), str(kind), kept(digests)) for name, kind, digests in columns)
            return cls(every, str(label), tuple(map(str, classes)))


def agree(told: Mapping[str, Described], wanted: Prepare) -> Agreed:
    """What clients' tables have in common.

    Raises:
        InputError: they have not the same columns, or one of them holds other things at one client than at another, or
            nothing that could be learned from.
    """
    names = sorted(told)
    first = told[names[0]]
    order = [column.name for column in first.columns]
    for name in names[1:]:
        mine = tuple(sorted(column.name for column in told[name].columns))
        apart = columns_apart(mine, tuple(sorted(order)), name, names[0])
        check(not apart, f"{apart}: give all clients the same columns, or leave it out with drop=.")
    by_name = {client: {column.name: column for column in told[client].columns} for client in names}
    columns = [_common({client: by_name[client][name] for client in names}, wanted) for name in order]
    label, classes = _one_label({client: told[client] for client in names}, wanted)
    return Agreed(tuple(columns), label, classes)


def _common(seen: Mapping[str, Seen], wanted: Prepare) -> Common:
    name = next(iter(seen.values())).name
    kinds = {column.kind: client for client, column in seen.items() if column.kind != EMPTY}
    check(kinds, f"column {name!r} has no value in any client's inner rows: leave it out with drop=[{name!r}].")
    for kind in kinds:
        if kind not in (NUMBER, BOOLEAN, CATEGORY):
            raise RunError(f"{kinds[kind]} says that column {name!r} holds {shown(kind)}.")
    if CATEGORY in kinds and len(kinds) > 1:
        other = next(kind for kind in kinds if kind != CATEGORY)
        raise InputError(
            f"column {name!r} is text or categories at {kinds[CATEGORY]} and {other}s at {kinds[other]}: make it one of the "
            f"two at both; read a text for a missing value as one, or name codes in categories=[{name!r}]."
        )
    kind = CATEGORY if CATEGORY in kinds else NUMBER if NUMBER in kinds else BOOLEAN
    total, clients = collections.Counter(), collections.Counter()
    for column in seen.values():
        total.update(dict(column.counts))
        clients.update(set(column.counts))
    alone = len(seen) == 1 or CATEGORIES in wanted.share
    kept = [each for each in sorted(total) if total[each] >= wanted.min_count and (alone or clients[each] > 1)]
    if kind == CATEGORY:
        least = f"in {wanted.min_count} inner rows" if alone else f"in {wanted.min_count} inner rows and at two clients"
        check(
            kept,
            f"no category of column {name!r} is {least}: leave it out with drop=[{name!r}], or lower min_count= or "
            'add share=("categories",).',
        )
        check(len(kept) <= MOST, f"column {name!r} has {len(kept):,} categories: leave it out, or raise min_count=.")
    elif kind == NUMBER and wanted.fill_of(name) == FREQUENT:
        kept = [each for each in kept if total[each] > 1]
        check(
            kept, f"no number of column {name!r} is in two rows, at two clients: fill it in with its mean or a number."
        )
        kept = [each for each in kept if total[each] == max(total[other] for other in kept)]
    else:
        kept = []
    return Common(name, kind, tuple(kept), tuple(total[each] for each in kept))


def _check_apart(told: Mapping[str, Described], label: str) -> None:
    """Refuse classes that differ in blanks or in capitals alone: each would be a class of its own."""
    seen: dict[str, tuple[str, str]] = {}
    for client, described in told.items():
        for text in described.classes:
            other, first = seen.setdefault(" ".join(text.split()).casefold(), (text, client))
            check(
                text == other,
                f"the label {label!r} is {shown(other)} at {first} and {shown(text)} at {client}, which differ in blanks or "
                "capitals alone: make them one, or, if they are two, name both in classes=.",
            )


def _one_label(told: Mapping[str, Described], wanted: Prepare) -> tuple[str, tuple[str, ...]]:
    kinds = {described.label: client for client, described in told.items()}
    if wanted.label is None:
        return "", ()
    if CLASSES in kinds and len(kinds) > 1:
        other = next(kind for kind in kinds if kind != CLASSES)
        raise InputError(
            f"the label {wanted.label!r} is text at {kinds[CLASSES]} and {other} at {kinds[other]}: make it one of the two, "
            "or say classes=."
        )
    if CLASSES in kinds:
        classes = wanted.classes or sorted({each for described in told.values() for each in described.classes})
        if wanted.classes is None:
            _check_apart(told, wanted.label)
        check(len(classes) <= MOST, f"the label {wanted.label!r} has {len(classes):,} different texts.")
        return CLASSES, tuple(classes)
    return (REAL if REAL in kinds else WHOLE), ()
