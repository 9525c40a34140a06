"""Values that are no numbers, or not those they seem to be: known, placed and refused in a sentence."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import PyTree

from ..errors import InputError

Columns = tuple[str, ...] | None  # of a table, or (name,) of a series that no key names; None: an array has no names

_SHOWN = 40  # characters of a value in a message
DATES = "convert them to numbers, such as days since a first day"
_INTO = {  # arrays and tables of other libraries, by the module of their type, which is never imported
    "torch": "pass numpy arrays, tensor.detach().cpu().numpy()",
    "tensorflow": "pass numpy arrays, tensor.numpy()",
    "polars": "pass a pandas table, frame.to_pandas(), or an array, frame.to_numpy()",
    "pyarrow": "pass a pandas table, table.to_pandas()",
    "xarray": "pass its numbers, array.values, and of a Dataset those of each variable",
    "scipy.sparse": "pass a dense array, matrix.toarray()",
    "jax.experimental.sparse": "pass a dense array, matrix.todense()",
    "cupy": "pass numpy arrays, array.get()",
    "dask": "compute it first, array.compute()",
    "paddle": "pass numpy arrays, tensor.numpy()",
    "mxnet": "pass numpy arrays, array.asnumpy()",
}


@dataclasses.dataclass(frozen=True)
class Whose:
    """Whose rows a message is about.

    Attributes:
        name: the client's.
        rows: "inner rows", or "rows" where there is one data set for both levels.
    """

    name: str
    rows: str

    def refusal(self, what: str, place: str, hint: str) -> InputError:
        """`what` cannot be used; `place` is `spot`'s."""
        return InputError(f"{self.name} has {what} in its {self.rows}{place}: {hint}.")

    def no_numbers(self, what: str, place: str, values: np.ndarray | list, hint: str) -> InputError:
        """`values` are no numbers but `what`."""
        flat = np.ravel(values)
        odd = (value for value in flat if not isinstance(value, (int, float, np.number)))  # among objects
        guilty = next(odd, flat[0] if len(flat) else None)
        first = f" (the first is {shown(guilty)})" if len(flat) else ""
        return InputError(f"{self.name} has {what} in its {self.rows}{place}{first}, which are no numbers: {hint}.")


def numbers(array: np.ndarray, whose: Whose, place: str) -> np.ndarray:
    """The same numbers in this machine's byte order.

    Raises:
        InputError: they are no numbers.
    """
    dtype = array.dtype
    if issubclass(dtype.type, np.void):
        hint = "pass a dict of arrays, {name: rows[name] for name in rows.dtype.names}"
        raise whose.refusal("a structured array", place, hint)
    if dtype.kind in "Mm":
        raise whose.no_numbers("dates or times", place, array[:1], DATES)
    if dtype.kind in "USTO":
        what = "Python objects" if dtype.kind == "O" else "text"
        raise whose.no_numbers(what, place, array, "encode them first, as an array of numbers")
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def whole(dtype: np.dtype) -> np.dtype:
    """The type, or 64 bits for one that is longer than JAX ever holds."""
    return {"g": np.dtype(np.float64), "G": np.dtype(np.complex128)}.get(dtype.char, dtype)


def conversion(value: PyTree) -> str | None:
    """How to turn an array or table of another library into one that is taken here; None if it is of none of them."""
    for kind in type(value).__mro__:
        for module, hint in _INTO.items():
            if kind.__module__ == module or kind.__module__.startswith(f"{module}."):
                return hint
    return None


def spot(path: str, columns: Columns, at: tuple[int, ...] = ()) -> str:
    """Where a number is, in words, or "" where that goes without saying: ", column 'age' of ['a']".

    Args:
        path: where its array is in the client's pytree, "['a']"; "" where the array is all.
        at: its index within a row.
    """
    if columns is not None:
        return f", column {columns[at[0] if at else 0]!r}" + (f" of {path}" if path else "")
    array = f", array {path}" if path else ""
    if len(at) == 1:
        return f"{array}, column {at[0]}"
    return f"{array}, at {list(at)} of a row" if at else array


def shown(value: Any) -> str:
    """A value for a message."""
    if isinstance(value, np.generic) and value.dtype.char in "gG":  # Python has none so long
        return str(value)
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def columns_apart(mine: Columns, theirs: Columns, me: str, them: str) -> str:
    """How the columns of two tables differ, in words; "" where they do not."""
    if mine == theirs:
        return ""
    if mine is None or theirs is None:
        one, other = (me, them) if mine is None else (them, me)
        return f"{one} has no names of columns where {other} has {shown((mine or theirs or [''])[0])}"
    lacks = [name for name in theirs if name not in mine]
    extra = [name for name in mine if name not in theirs]
    if lacks and extra:
        return f"{me} has a column {extra[0]!r} where {them} has {lacks[0]!r}"
    if lacks:
        return f"{me} lacks a column {lacks[0]!r} that {them} has"
    if extra:
        return f"{me} has a column {extra[0]!r} that {them} lacks"
    place = next(k for k, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
    return f"{me} has column {mine[place]!r} in place {place}, where {them} has {theirs[place]!r}"
