"""What clients agreed on: how a table of any of them, or a new one, becomes rows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError, check, warn
from ..rows.values import Whose, columns_apart, shown
from .columns import BOOLEAN, CATEGORY, EMPTY, NUMBER, kind_of, numbers_of, texts_of
from .measured import Measured
from .moments import Moments
from .reading import frame_of
from .schema import CLASSES, WHOLE, Agreed, Common, check_labels
from .wanted import FREQUENT, MEAN, ONE_HOT, OTHER, RANGE, SEPARATE, STANDARD, TOGETHER, Fill, Prepare

if TYPE_CHECKING:
    import pandas

VERSION = 1
PREPARED = "prepared.json"  # in the folder of a run


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the clients' tables.

    Attributes:
        name, kind: what it is called, and whether it holds a "number", a "boolean" or a "category".
        fill: what stands for a missing value: a number, or a category's text.
        moments: of the inner rows of all clients, where it holds numbers or booleans.
        extremes: the smallest and the largest of these numbers, where clients shared them.
        categories: those that are told apart, in the order of their texts.
    """

    name: str
    kind: str
    fill: float | str
    moments: Moments = Moments()
    extremes: tuple[float, float] | None = None
    categories: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """The mean of the inner rows of all clients."""
        return self.moments.mean

    @property
    def deviation(self) -> float:
        """Their standard deviation, the root of the mean square of v - mean."""
        return self.moments.deviation


@dataclasses.dataclass(frozen=True)
class Prepared:
    """How a table becomes rows: what clients agreed on, and nothing of their rows beside.

    Attributes:
        table: the columns of the clients' tables, in the order of the rows' numbers.
        label: the column to predict, if there is one.
        labels: what that holds: "whole numbers", "numbers" or "classes".
        classes: of a label of text, in order.
        ignored: columns that a table may have too and that are left out.
        scale, encode, shape: as `Prepare` says (`shape` is its `columns`).
    """

    table: tuple[Column, ...]
    label: str | None = None
    labels: str = ""
    classes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    scale: str | None = STANDARD
    encode: str = ONE_HOT
    shape: str = TOGETHER

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the numbers of a row, in order: "age", and of a category "job=clerk" (or "job" in codes)."""
        return tuple(name for column in self.table for name in self._names(column))

    @property
    def digest(self) -> str:
        """What tells it from another: sites compare it before a run begins."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]

    def rows(self, table: object, client: str = "the table", label: bool | None = None) -> dict[str, np.ndarray]:
        """The rows of a table, as a loss or a prediction takes them.

        Columns may come in any order. A category that was not agreed on is "other".

        Args:
            table: a table as `FederatedData.from_table` takes it: pandas, polars, a path; without a column of clients.
            client: what to call it in messages.
            label: whether the label is wanted; None: if the table has it.

        Returns:
            {"a": float32 (rows, columns), "b": (rows,) int32 or float32}, or an array a column, by name.

        Raises:
            InputError: the table lacks a column, has an unknown one, or holds what cannot be made a number.
        """
        frame, whose = frame_of(table, client), Whose(client, "table")
        return self.numbers(frame, whose, label)

    def numbers(self, frame: pandas.DataFrame, whose: Whose, label: bool | None = None) -> dict[str, np.ndarray]:
        """As `rows`, of a pandas frame; `whose` is for messages."""
        wanted = label if label is not None else self.label in frame.columns
        self._check_columns(list(frame.columns), whose, wanted and self.label is not None)
        parts = {column.name: self._part(frame[column.name], column, whose) for column in self.table}
        own = {} if not wanted or self.label is None else {self.label: self._label(frame[self.label], whose)}
        if self.shape == SEPARATE:
            return {**parts, **own}
        wide = [
            part.astype(np.float32) if part.ndim == 2 else part[:, None].astype(np.float32) for part in parts.values()
        ]
        rows = {"a": np.concatenate(wide, axis=1)}
        return {**rows, "b": own[str(self.label)]} if own else rows

    def one(self) -> dict[str, np.ndarray]:
        """One row of zeros, shaped like all."""
        widths = {column.name: len(self._names(column)) for column in self.table}
        hot = {column.name for column in self.table if column.kind == CATEGORY and self.encode == ONE_HOT}
        codes = {column.name for column in self.table if column.kind == CATEGORY} - hot
        label = np.float32 if self.labels not in (WHOLE, CLASSES) else np.int32
        if self.shape == TOGETHER:
            rows = {"a": np.zeros((1, sum(widths.values())), np.float32)}
            return rows if self.label is None else {**rows, "b": np.zeros(1, label)}
        each = {
            name: np.zeros((1, width) if name in hot else 1, np.int32 if name in codes else np.float32)
            for name, width in widths.items()
        }
        return each if self.label is None else {**each, self.label: np.zeros(1, label)}

    def named(self) -> dict[str, tuple[str, ...]]:
        """The names of columns by where they are in the rows, as `FederatedData.columns` has them."""
        if self.shape == TOGETHER:
            return {"['a']": self.columns}
        hot = [column for column in self.table if column.kind == CATEGORY and self.encode == ONE_HOT]
        return {f"[{column.name!r}]": self._names(column) for column in hot}

    # A column -------------------------------------------------------------------------------------------------------

    def _names(self, column: Column) -> tuple[str, ...]:
        if column.kind != CATEGORY or self.encode != ONE_HOT:
            return (column.name,)
        return tuple(f"{column.name}={category}" for category in (*column.categories, OTHER))

    def _check_columns(self, found: Sequence[str], whose: Whose, label: bool) -> None:
        known = [column.name for column in self.table] + ([self.label] if label and self.label is not None else [])
        ignored = {*self.ignored, *([] if label or self.label is None else [self.label])}
        mine = tuple(sorted(name for name in found if name not in ignored))
        apart = columns_apart(mine, tuple(sorted(known)), whose.name, "what was prepared")
        check(not apart, f"{apart}: give it the columns that were there when it was prepared.")

    def _part(self, values: pandas.Series, column: Column, whose: Whose) -> np.ndarray:
        kind = kind_of(values, whose, column.name)
        if column.kind == CATEGORY:
            return self._category(values, column, whose)
        empty = np.full(len(values), np.nan)
        numbers = empty if kind == EMPTY else numbers_of(values, whose, column.name)
        missing = np.isnan(numbers)
        numbers = np.where(missing, column.fill, numbers)
        with np.errstate(over="ignore"):
            return self._scaled(numbers, column).astype(np.float32)

    def _scaled(self, numbers: np.ndarray, column: Column) -> np.ndarray:
        if column.kind == BOOLEAN or self.scale is None:
            return numbers
        if self.scale == RANGE:
            assert column.extremes is not None
            low, high = column.extremes
            return (numbers - low) / ((high - low) or 1.0)
        return ((numbers - column.moments.mean) - column.moments.rest) / (column.deviation or 1.0)

    def _category(self, values: pandas.Series, column: Column, whose: Whose) -> np.ndarray:
        codes, texts = texts_of(values, whose, column.name)
        place = {category: k for k, category in enumerate(column.categories)}
        other = len(place)
        own = np.array([*(place.get(text, other) for text in texts), place.get(str(column.fill), other)], np.int32)[
            codes
        ]
        if self.encode != ONE_HOT:
            return own
        return np.eye(other + 1, dtype=np.float32)[own]

    def _label(self, values: pandas.Series, whose: Whose) -> np.ndarray:
        name, place = str(self.label), f", the label {self.label!r}"
        check_labels(values, whose, name)
        kind = kind_of(values, whose, name)
        if self.labels == CLASSES:
            codes, texts = texts_of(values, whose, name)
            unknown = [text for text in texts if text not in self.classes]
            if unknown:
                hint = f"the classes are {list(self.classes)}"
                raise whose.refusal(f"{shown(unknown[0])}", place, hint)
            return np.array([self.classes.index(text) for text in texts], np.int32)[codes]
        if kind == CATEGORY:
            raise whose.refusal("text", place, "the others' labels are numbers: make it numbers")
        numbers = numbers_of(values, whose, name)
        if self.labels != WHOLE:
            return numbers.astype(np.float32)
        odd = (numbers != np.rint(numbers)) | (np.abs(numbers) >= 2**31)
        if odd.any():
            hint = "the inner rows' labels are whole numbers of 32 bits: make them whole, or all with fractions"
            raise whose.refusal(f"{numbers[odd][0]:g}", place, hint)
        return numbers.astype(np.int32)

    # On disk --------------------------------------------------------------------------------------------------------

    def text(self) -> str:
        """As JSON, which has all of it, numbers to the last bit."""
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, as JSON."""
        Path(path).write_text(self.text() + "\n")


def read(text: str, what: str = "the text") -> Prepared:
    """What `Prepared.text` has written.

    Raises:
        InputError: it is something else.
    """
    try:
        told = json.loads(text)
        check(told["version"] == VERSION, f"{what} was prepared by another version of fedbilevel: prepare it anew.")
        return Prepared(
            tuple(_column(column) for column in told["table"]),
            told["label"], told["labels"], tuple(told["classes"]), tuple(told["ignored"]), told["scale"], told["encode"],
            told["shape"],
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{what} is no prepared table ({error!r}): it is the file that Prepared.save writes."
        ) from None


def _column(told: Mapping) -> Column:
    extremes = None if told["extremes"] is None else (float(told["extremes"][0]), float(told["extremes"][1]))
    fill = told["fill"] if isinstance(told["fill"], str) else float(told["fill"])
    categories = tuple(map(str, told["categories"]))
    return Column(str(told["name"]), str(told["kind"]), fill, Moments(**told["moments"]), extremes, categories)


def load_prepared(path: str | os.PathLike[str]) -> Prepared:
    """The `Prepared` that a file holds, or prepared.json in the folder of a run.

    Raises:
        InputError: there is none, or it is something else.
    """
    file = Path(path) / PREPARED if Path(path).is_dir() else Path(path)
    check(file.is_file(), f"there is no file {file}: name what Prepared.save wrote, or the folder of a run.")
    return read(file.read_text(), str(file))


# What comes of both exchanges ---------------------------------------------------------------------------------------------


def settled(agreed: Agreed, known: Sequence[Measured], wanted: Prepare, ignored: Sequence[str] = ()) -> Prepared:
    """What clients agreed on.

    Raises:
        InputError: a fill suits its column not.

    Warns:
        FedbilevelWarning: a column is the same in all inner rows.
    """
    table = tuple(_settled(column, own, wanted) for column, own in zip(agreed.common, known, strict=True))
    for column in table:
        if column.kind == NUMBER and column.moments.count and not column.deviation:
            warn(
                f"column {column.name!r} is {column.mean:g} in all inner rows of all clients, and tells nothing: leave it "
                f"out with drop=[{column.name!r}]."
            )
    return Prepared(
        table, wanted.label, agreed.label, agreed.classes, (*wanted.drop, *ignored), wanted.scale, wanted.encode,
        wanted.columns,
    )  # fmt: skip


def _settled(column: Common, own: Measured, wanted: Prepare) -> Column:
    fill = wanted.fill_of(column.name)
    if column.kind == CATEGORY:
        categories = tuple(sorted(text for text in own.texts.values() if text != OTHER))
        often = dict(zip(column.kept, column.counts, strict=True))
        usual = min(own.texts, key=lambda each: (-often[each], own.texts[each]))
        by_column = isinstance(wanted.fill, Mapping) and column.name in wanted.fill and fill not in (MEAN, FREQUENT)
        return Column(column.name, CATEGORY, _as_text(fill) if by_column else own.texts[usual], categories=categories)
    number = _number(fill, column, own)
    return Column(column.name, column.kind, number, own.moments, own.extremes)


def _as_text(fill: Fill) -> str:
    return fill if isinstance(fill, str) else f"{fill:g}"


def _number(fill: Fill, column: Common, own: Measured) -> float:
    if fill == MEAN:
        return own.moments.mean
    if fill == FREQUENT:
        return float(own.moments.mean > 0.5) if column.kind == BOOLEAN else min(map(float, own.texts.values()))
    check(
        not isinstance(fill, str),
        f"fill= for column {column.name!r} is {shown(fill)}, and the column holds {column.kind}s: give a number, "
        '"mean" or "most frequent".',
    )
    return float(fill)
