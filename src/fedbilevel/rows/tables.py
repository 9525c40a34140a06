"""pandas tables as rows: a row is the vector of its columns' numbers, and the columns' names are kept."""

from __future__ import annotations

import collections

import numpy as np
import pandas
from pandas.api.extensions import ExtensionDtype

from .values import DATES, Columns, Whose, numbers, shown, spot

_EXACT = 2**53  # up to where float64 holds every integer
_ENCODE = "encode them first, with .cat.codes or pandas.get_dummies"

Leaf = pandas.DataFrame | pandas.Series | pandas.Index


def table(leaf: Leaf, whose: Whose, path: str, keyed: bool, doubts: list[str]) -> tuple[np.ndarray, Columns]:
    """(rows, columns) numbers of a frame with its columns' names, (rows,) of a series with its own.

    Args:
        keyed: whether a dict's key names the leaf; a series needs no other name then.
        doubts: is told what changes on the way.

    Raises:
        InputError: columns of the same name, or of values that are no numbers or missing.
    """
    if not isinstance(leaf, pandas.DataFrame):
        named = None if keyed or leaf.name is None else (str(leaf.name),)
        return _column(pandas.Series(leaf), whose, spot(path, named)), named
    names = tuple(map(str, leaf.columns))
    if not names:
        raise whose.refusal("a table without columns", spot(path, None), "give it at least one")
    for name, times in collections.Counter(names).items():
        if times > 1:
            raise whose.refusal(f"{times} columns named {name!r}", spot(path, None), "give each a name of its own")
    dtypes = set(leaf.dtypes)
    if len(dtypes) == 1 and _plain(next(iter(dtypes))):
        return numbers(leaf.to_numpy(), whose, ""), names
    columns = [_column(leaf.iloc[:, j], whose, spot(path, names, (j,))) for j in range(len(names))]
    dtype = np.result_type(*columns)
    for j, column in enumerate(columns):
        doubts.extend(_merged(column, dtype, whose, spot(path, names, (j,))))
    return np.stack([column.astype(dtype) for column in columns], axis=1), names


def _plain(dtype: np.dtype | ExtensionDtype) -> bool:
    return isinstance(dtype, np.dtype) and dtype.kind in "biufc"


def _column(series: pandas.Series, whose: Whose, place: str) -> np.ndarray:
    """(rows,) the numbers of one column."""
    dtype = series.dtype
    if isinstance(dtype, np.dtype):
        return numbers(series.to_numpy(), whose, place)
    categories = isinstance(dtype, pandas.CategoricalDtype)
    kind = getattr(dtype.categories.dtype if categories else dtype, "kind", "O")
    if kind not in "biufc":
        what, hint = ("dates or times", DATES) if kind in "Mm" else ("text or objects", "encode them first")
        what, hint = ("categories", _ENCODE) if categories else (what, hint)
        raise whose.no_numbers(what, place, list(series.iloc[:1]), hint)
    missing = np.flatnonzero(series.isna().to_numpy())
    if len(missing):
        what = f"missing values (the first in row {missing[0]})"
        raise whose.refusal(what, place, "fill them in or drop those rows first")
    plain = getattr(dtype, "numpy_dtype", None)  # of a nullable column
    return numbers(np.asarray(series) if plain is None else series.to_numpy(dtype=plain), whose, place)


def _merged(column: np.ndarray, dtype: np.dtype, whose: Whose, place: str) -> list[str]:
    """What to say of integers that become equal as floats, which the other columns of their table are."""
    if column.dtype.kind not in "iu" or dtype.kind not in "fc" or not len(column):
        return []
    if int(column.max()) <= _EXACT and int(column.min()) >= -_EXACT:
        return []
    values = np.unique(column)
    same = np.flatnonzero(np.diff(values.astype(dtype)) == 0)
    if not len(same):
        return []
    one, other = (shown(values[same[0] + k]) for k in (0, 1))
    return [
        f"{whose.name} has {one} and {other} in its {whose.rows}{place}, which become equal as {dtype}: "
        "number them anew, or pass that column as an array of its own."
    ]
