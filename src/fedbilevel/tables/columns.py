"""The columns of one client's table: what they hold, as numbers and as texts; refused in a sentence where it is neither."""

from __future__ import annotations

import datetime
import decimal
import math
import numbers
import re
from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from ..errors import check
from ..rows.values import DATES, Whose, shown

if TYPE_CHECKING:
    import pandas

NUMBER, BOOLEAN, CATEGORY, EMPTY = "number", "boolean", "category", "empty"
_DROP = "leave it out with drop="
_CODES = 10  # different numbers up to which a column of text may hold codes
_NUMERAL = re.compile(r"\s*[-+]?(\d+([.,]\d*)?|[.,]\d+)([eE][-+]?\d+)?\s*$")
_DATE = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}([ T]\d{1,2}:\d\d.*)?$")


class Texts(NamedTuple):
    """A column as texts: of each row the place of its text, or -1 where it is missing."""

    codes: Int[np.ndarray, " rows"]
    texts: list[str]


def kind_of(column: pandas.Series, whose: Whose, name: str) -> str:
    """What a column holds: numbers, booleans, text, or nothing.

    Raises:
        InputError: dates, several kinds at once, or anything else.
    """
    import pandas

    dtype = column.dtype
    if isinstance(dtype, pandas.StringDtype):
        return EMPTY if column.isna().all() else CATEGORY
    if isinstance(dtype, pandas.CategoricalDtype):
        return CATEGORY if _by_kind(column, whose, name) else EMPTY
    if dtype.kind in "mM" or isinstance(dtype, pandas.PeriodDtype):
        raise _odd(whose, name, "dates or times", DATES)
    if dtype.kind in "biuf":
        return EMPTY if _all_missing(column) else BOOLEAN if dtype.kind == "b" else NUMBER
    if dtype.kind not in "OTU":
        raise _odd(whose, name, f"values of {dtype}", "")
    found = _by_kind(column, whose, name)
    if CATEGORY in found and len(found) > 1:
        other = next(value for kind, value in found.items() if kind != CATEGORY)
        what = f"text and numbers, such as {shown(found[CATEGORY])} and {shown(other)}"
        raise _odd(whose, name, what, "make it one of the two (a text for a missing value: read it as missing)")
    return next(iter(found), EMPTY) if len(found) < 2 else NUMBER


def _all_missing(column: pandas.Series) -> bool:
    """Of a column of numbers or booleans."""
    if not isinstance(column.dtype, np.dtype):
        return bool(column.isna().all())
    return not len(column) or (column.dtype.kind == "f" and bool(np.isnan(column.to_numpy()).all()))


def _by_kind(column: pandas.Series, whose: Whose, name: str) -> dict[str, object]:
    """kind -> the first value of that kind, of numbers, booleans and texts.

    Raises:
        InputError: there are others.
    """
    found: dict[str, object] = {}
    for value in _different(column, whose, name):
        found.setdefault(_kind(value), value)
    if "date" in found:
        raise _odd(whose, name, "dates or times", DATES)
    if "object" in found:
        raise _odd(whose, name, f"values that are neither numbers nor text (such as {shown(found['object'])})", "")
    return found


def check_dates(texts: list[str], whose: Whose, name: str) -> None:
    """Refuse texts that are all dates: each would be a category."""
    if len(texts) > 1 and all(map(_DATE.match, texts)):
        raise _odd(whose, name, f"dates as text (such as {shown(min(texts))})", DATES)


def check_numbers(texts: list[str], whose: Whose, name: str) -> None:
    """Refuse texts most of which are numbers, more of them than codes are: each would be a category."""
    other = [text for text in texts if not _NUMERAL.match(text)]
    if len(texts) - len(other) > max(_CODES, len(other)):
        what = f"numbers as text{f' beside {shown(min(other))}' if other else f' (such as {shown(min(texts))})'}"
        missing = f" (pandas.read_csv(..., na_values=[{min(other)!r}]) reads that as missing)" if other else ""
        hint = f"make them numbers{missing}, or, if they are codes, name it in categories=[{name!r}]"
        raise _odd(whose, name, what, hint)


def numbers_of(column: pandas.Series, whose: Whose, name: str) -> Float64[np.ndarray, " rows"]:
    """The numbers of a column of numbers or booleans; NaN where one is missing.

    Raises:
        InputError: one is infinite, or none.
    """
    if isinstance(column.dtype, np.dtype) and column.dtype.kind in "biuf":
        values = column.to_numpy().astype(np.float64)
    elif column.dtype.kind in "biuf":
        values = column.to_numpy(dtype=np.float64, na_value=np.nan)
    else:
        missing = column.isna().to_numpy()
        flat = [math.nan if gone else value for value, gone in zip(column.astype(object), missing, strict=True)]
        odd = next((value for value in flat if _kind(value) not in (NUMBER, BOOLEAN)), None)
        if odd is not None:
            hint = "all clients agreed on numbers: correct it, or read a text for a missing value as missing"
            raise whose.refusal(f"{shown(odd)}, which is no number,", f", column {name!r}", hint)
        values = np.array([float(value) for value in flat], np.float64)
    endless = np.isinf(values)
    if endless.any():
        hint = "correct it, or make it a missing value"
        row = f"an infinite number (in row {column.index[int(endless.argmax())]})"
        raise whose.refusal(row, f", column {name!r}", hint)
    return values


def texts_of(column: pandas.Series, whose: Whose, name: str) -> Texts:
    """The texts of a column, of whatever kind: 3.0 is "3", as 3 is.

    Raises:
        InputError: it holds what has no text.
    """
    import pandas

    try:
        codes, values = pandas.factorize(column)
    except TypeError:
        codes, values = pandas.factorize(column.map(repr))
    texts: dict[str, int] = {}
    places = [texts.setdefault(_text(value), len(texts)) for value in values]
    return Texts(np.array([*places, -1], np.int64)[codes], list(texts))


def _different(column: pandas.Series, whose: Whose, name: str) -> list:
    import pandas

    values = column.dropna()
    try:
        return list(pandas.unique(values))
    except TypeError:  # lists, dicts
        odd = next(value for value in values if not isinstance(value, Hashable))
        what = f"values that are neither numbers nor text (such as {shown(odd)})"
        raise _odd(whose, name, what, "") from None


def _kind(value: object) -> str:
    if isinstance(value, (bool, np.bool_)):
        return BOOLEAN
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta, np.datetime64, np.timedelta64)):
        return "date"
    if isinstance(value, (numbers.Real, decimal.Decimal)):
        return NUMBER
    return CATEGORY if isinstance(value, str) else "object"


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value))
    number = float(value)  # pyright: ignore[reportArgumentType]  a number: nothing else came by `kind_of`
    return str(int(number)) if number.is_integer() else repr(number)


def check_named(names: list[str], known: list[str], whose: str, argument: str = "drop") -> None:
    """Refuse names of columns that a table does not have."""
    for name in names:
        few = ", ".join(map(repr, known[:8])) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
        check(name in known, f"{argument}= names a column {name!r}, which {whose} does not have: it has {few}.")


def _odd(whose: Whose, name: str, what: str, hint: str):
    return whose.refusal(what, f", column {name!r}", f"{_DROP}[{name!r}]" + (f", or {hint}" if hint else ""))
