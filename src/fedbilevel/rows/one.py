"""One client's rows as a user passes them, turned into numpy arrays: right, or refused in a sentence.

What has other values than it seems to (masked entries), no numbers (text, dates, objects) or no rows (lists) stops here.
Tables keep the names of their columns beside their numbers.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from ..arrays import Structure
from ..errors import InputError
from ..foreign import native
from ..jaxprs import Tracer
from ..problem import describe
from .values import Columns, Whose, conversion, numbers, shown, spot

_PLAIN = frozenset("?bhilqBHILQefdFD")  # the numpy types that go on as they are
_LONG = 100  # entries of a list that nobody means as the arrays of one row


@dataclasses.dataclass
class Read:
    """One client's rows.

    Attributes:
        given: the pytree as it was passed.
        leaves: arrays, rows first, of numbers in this machine's byte order.
        structure: the pytree that they make up.
        columns: of each leaf, the names of its columns.
        doubts: sentences about values that changed on the way; the caller warns.
    """

    given: PyTree
    leaves: list[np.ndarray]
    structure: Structure
    columns: list[Columns]
    doubts: list[str] = dataclasses.field(default_factory=list)

    @property
    def rows(self) -> PyTree:
        """The arrays in their pytree."""
        return jax.tree.unflatten(self.structure, self.leaves)

    @property
    def paths(self) -> list[str]:
        """Where each leaf is: "['a'][0]"."""
        return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(self.rows)[0]]

    def spot(self, leaf: int, at: tuple[int, ...] = ()) -> str:
        """Where a number is, in words: ", column 'age' of ['a']"; `at` is its index within a row."""
        return spot(self.paths[leaf], self.columns[leaf], at)


def read(rows: PyTree, name: str, level: str = "") -> Read:
    """The rows of the client `name`, at a level or for both.

    Raises:
        InputError: values that are no numbers, hidden or missing ones, arrays of unequal length, lists, or objects of
            another library.
    """
    rows = native(rows)
    whose = Whose(name, f"{level} rows" if level else "rows")
    _no_lists(rows, whose, "")
    leaves, structure = jax.tree.flatten(rows)
    out = Read(rows, [], structure, [])
    for index, leaf in enumerate(leaves):
        if type(leaf) is np.ndarray and leaf.ndim and leaf.dtype.char in _PLAIN and leaf.dtype.isnative:
            array, columns = leaf, None
        else:
            path = jax.tree_util.tree_flatten_with_path(rows)[0][index][0]
            array, columns = as_array(leaf, whose, path, out.doubts)
        out.leaves.append(array)
        out.columns.append(columns)
    _check_lengths(out, whose)
    return out


def as_array(leaf: PyTree, whose: Whose, path: KeyPath, doubts: list[str]) -> tuple[np.ndarray, Columns]:
    """(The array that a leaf is, the names of its columns); `doubts` is told what changes on the way.

    Raises:
        InputError: it is none, or not one of numbers.
    """
    where = jax.tree_util.keystr(path)
    hint = conversion(leaf)
    if hint is not None:
        kind = f"{type(leaf).__module__.partition('.')[0]} {type(leaf).__name__}"
        raise whose.refusal(f"a {kind}", spot(where, None), hint)
    if is_table(leaf):
        from .tables import table  # pandas is there already; without tables it is never imported

        keyed = bool(path) and isinstance(path[-1], jax.tree_util.DictKey)
        return table(leaf, whose, where, keyed, doubts)
    if isinstance(leaf, np.ma.MaskedArray):
        if np.ma.is_masked(leaf):
            what = "masked values, whose hidden numbers would be trained on,"
            raise whose.refusal(what, spot(where, None), "drop those rows, or fill them in with .filled(...)")
        leaf = leaf.data
    return numbers(_asarray(leaf, whose, spot(where, None)), whose, spot(where, None)), None


def is_table(leaf: PyTree) -> bool:
    """Whether it is a pandas frame, series or index."""
    pandas = sys.modules.get("pandas")  # without it there are none
    return pandas is not None and isinstance(leaf, (pandas.DataFrame, pandas.Series, pandas.Index))


def _asarray(leaf: PyTree, whose: Whose, place: str) -> np.ndarray:
    if isinstance(leaf, Tracer):
        raise whose.refusal("a value that jit, vmap or grad traces", place, "build the data outside of what is traced")
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise whose.refusal("jax.random keys", place, "pass their numbers, jax.random.key_data(keys)")
    if isinstance(leaf, Mapping):
        raise whose.refusal(f"a {type(leaf).__name__}", place, "pass a dict of arrays, dict(rows)")
    try:
        array = np.asarray(leaf)
    except Exception as error:  # whatever an object's own conversion raises
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = f"a {type(leaf).__name__} that is no array ({text})"
        raise whose.refusal(what, place, "pass numpy arrays, rows first") from error
    if array.ndim == 0:
        what = f"{_kind(leaf)} where there should be an array"
        raise whose.refusal(what, place, "every part of a data set is an array, rows first")
    return array


def _kind(leaf: PyTree) -> str:
    number = isinstance(leaf, (str, bytes, bool, int, float, complex, np.generic, np.ndarray, jax.Array))
    return shown(np.asarray(leaf)[()]) if number else f"a {type(leaf).__name__}"


def _no_lists(rows: PyTree, whose: Whose, where: str) -> None:
    """Refuse lists of numbers and of rows, without looking at all of them; JAX would take each number for an array."""
    if isinstance(rows, dict):
        for key, part in rows.items():
            _no_lists(part, whose, f"{where}[{key!r}]")
    elif type(rows) in (list, tuple):
        scalar = len(rows) > 0 and isinstance(rows[0], (bool, int, float, complex, str, bytes, np.generic))
        if scalar or len(rows) > _LONG:
            what = f"a {type(rows).__name__} of {len(rows)} {'values' if scalar else 'parts'}"
            hint = "pass arrays, rows first: numpy.asarray(rows), or numpy.stack of a list of arrays"
            raise whose.refusal(what, spot(where, None), hint)
        for index, part in enumerate(rows):
            _no_lists(part, whose, f"{where}[{index}]")


def _check_lengths(own: Read, whose: Whose) -> None:
    if not own.leaves:
        raise InputError(f"{whose.name} has no arrays in its {whose.rows}: pass a pytree of arrays, rows first.")
    if any(len(leaf) != len(own.leaves[0]) for leaf in own.leaves):
        raise InputError(
            f"{whose.name}: the arrays of one data set must have the same number of rows, got {describe(own.rows)}."
        )
