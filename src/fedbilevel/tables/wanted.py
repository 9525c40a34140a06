"""What is wanted of tables before they are rows: `Prepare`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from ..errors import InputError, check
from ..rows.values import shown

MEAN, FREQUENT = "mean", "most frequent"
EXTREMES, CATEGORIES = "extremes", "categories"
STANDARD, RANGE = "standard", "range"
ONE_HOT, CODES = "one-hot", "codes"
TOGETHER, SEPARATE = "together", "separate"
OTHER = "other"  # the category of what has none

Fill = str | float


@dataclasses.dataclass(frozen=True)
class Prepare:
    """What is wanted of clients' tables before they are rows. Clients agree on it without pooling anything.

    A column of numbers becomes (v - mean) / deviation, by the mean and the deviation of the INNER rows of all
    clients. Of booleans it becomes 0 or 1. Of text or categories it becomes one column of 0 and 1 for each category
    that the clients agree on, and one for all others, "other".

    What travels, in two exchanges, and nothing else of any table. First, from each client: the columns' names and
    whether they hold numbers, booleans or text; of each category a digest (SHA-256 of its text, from which the text
    cannot be read, but which whoever guesses the text can recognise) with the number of inner rows that have it; of a
    label of text its classes. Then: of a column of numbers, how many inner rows have one, their mean and their centred
    sum of squares; of a category the text, where at least two clients have it (and at least `min_count` inner rows).
    Each client is told what came of it. `share` adds to this. It is the server that asks for texts: clients trust it
    to ask for no others.

    Args:
        label: the column to predict; None: there is none. Numbers stay as they are (int32 where no client has
            fractions, else float32), booleans are 0 and 1, and text is the number of its class.
        drop: columns to leave out.
        fill: what stands for a missing value: "mean" (of numbers, and of a column of text its most frequent category);
            "most frequent"; a number (of numbers; of text the most frequent category); or one of these, or a text,
            by the name of the column. Missing labels are refused. "most frequent" sends, of a column of numbers
            too, a digest of each value with its number of inner rows: numbers are easily guessed.
        categories: columns of numbers or booleans that are codes: categories, like text.
        min_count: a category that fewer inner rows have, of all clients, goes to "other".
        share: what is sent beside: "extremes" (each client's smallest and largest number of each column),
            "categories" (those that only one client has too, which otherwise go to "other" where there are several
            clients).
        scale: "standard"; "range" ((v - low) / (high - low), for which clients share "extremes"); or None, the numbers
            as they are.
        encode: "one-hot", or "codes": a category is its number, in the order of texts, and "other" the last.
        columns: "together": rows are {"a": float32 (columns,), "b": label}; "separate": {name: float32 ()}, one array a
            column, one of categories float32 (categories,) or, in codes, int32 (), and the label by its own name.
        classes: the classes of a label of text, in order; None: those that clients have, in the order of texts.

    Raises:
        InputError: an argument means nothing.
    """

    label: str | None = None
    drop: Sequence[str] = ()
    fill: Fill | Mapping[str, Fill] = MEAN
    categories: Sequence[str] = ()
    min_count: int = 1
    share: Sequence[Literal["extremes", "categories"]] = ()
    scale: Literal["standard", "range"] | None = STANDARD
    encode: Literal["one-hot", "codes"] = ONE_HOT
    columns: Literal["together", "separate"] = TOGETHER
    classes: Sequence[str] | None = None

    def __post_init__(self):
        check(self.label is None or isinstance(self.label, str), f"label= is a column's name; got {shown(self.label)}.")
        for name in ("drop", "categories"):
            object.__setattr__(self, name, _names(getattr(self, name), f"{name}= is a list of columns' names"))
        share = _names(self.share, 'share= is a list of "extremes" and "categories"')
        wrong = [word for word in share if word not in (EXTREMES, CATEGORIES)]
        check(not wrong, f'share= is a list of "extremes" and "categories"; got {shown(wrong and wrong[0])}.')
        object.__setattr__(self, "share", share)
        for name, known in (("scale", (STANDARD, RANGE, None)), ("encode", (ONE_HOT, CODES)),
                            ("columns", (TOGETHER, SEPARATE))):  # fmt: skip
            value = getattr(self, name)
            check(value in known, f"{name}= is {' or '.join(map(repr, known))}; got {shown(value)}.")
        check(
            self.scale != RANGE or EXTREMES in share,
            'scale="range" needs the smallest and the largest number of all clients: add share=("extremes",).',
        )
        whole = isinstance(self.min_count, int) and not isinstance(self.min_count, bool) and self.min_count >= 1
        check(whole, f"min_count= is a number of rows, at least 1; got {shown(self.min_count)}.")
        if self.classes is not None:
            classes = _names(self.classes, "classes= is a list of the label's texts")
            good = len(classes) == len(set(classes)) >= 1
            check(good, f"classes= lists the texts of label=, each once; got {shown(list(classes))}.")
            object.__setattr__(self, "classes", classes)
        self._check_fill()
        twice = [name for name in self.drop if name == self.label]
        check(not twice, f"{shown(self.label)} is the label and is dropped: take it out of drop=.")

    def _check_fill(self) -> None:
        by_column = isinstance(self.fill, Mapping)
        fills = list(self.fill.values()) if isinstance(self.fill, Mapping) else [self.fill]
        for fill in fills:
            number = isinstance(fill, (int, float)) and math.isfinite(fill)
            good = number or (isinstance(fill, str) and (by_column or fill in (MEAN, FREQUENT)))
            check(good, f'fill= is "mean", "most frequent", a number, or {{column: one of these}}; got {shown(fill)}.')
        if isinstance(self.fill, Mapping):
            object.__setattr__(self, "fill", dict(self.fill))

    def fill_of(self, column: str) -> Fill:
        """What stands for a missing value of a column."""
        return self.fill.get(column, MEAN) if isinstance(self.fill, Mapping) else self.fill

    @property
    def named(self) -> list[tuple[str, str]]:
        """The columns that it names, and where: (argument, name)."""
        by_column = list(self.fill) if isinstance(self.fill, Mapping) else []
        label = [] if self.label is None else [("label", self.label)]
        every = ("drop", self.drop), ("fill", by_column), ("categories", self.categories)
        return [*label, *((argument, name) for argument, names in every for name in names)]


def merged(
    prepare: Prepare | None,
    label: str | None,
    drop: Sequence[str],
    columns: Literal["together", "separate"] | None,
    client: str | None,
) -> Prepare:
    """What is wanted, of which some may be said beside `prepare`; a column `client` is left out in any case.

    Raises:
        InputError: the two say different things.
    """
    check(prepare is None or isinstance(prepare, Prepare), f"prepare= is a fedbilevel.Prepare; got {shown(prepare)}.")
    said: dict = {"label": label, "drop": drop or None, "columns": columns}
    beside = {name: value for name, value in said.items() if value is not None}
    if prepare is None:
        prepare = Prepare()
    usual = {"label": None, "drop": (), "columns": TOGETHER}
    for name, value in beside.items():
        own = getattr(prepare, name)
        value = tuple(value) if name == "drop" else value
        check(own in (usual[name], value), f"{name}= is {shown(value)} and prepare= says {shown(own)}: say it once.")
    found = dataclasses.replace(prepare, **beside)
    return dataclasses.replace(found, drop=tuple(name for name in found.drop if name != client))


def _names(value: object, what: str) -> tuple[str, ...]:
    """Names in a list, as a tuple."""
    good = isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(name, str) for name in value)
    if not good:
        raise InputError(f"{what}; got {shown(value)}.")
    assert isinstance(value, Sequence)
    return tuple(value)
