"""Whether the clients' rows go together: the same structure, columns, shapes and dtypes."""

from __future__ import annotations

import jax

from ..errors import InputError, check
from ..problem import describe
from .one import Read, is_table
from .values import columns_apart, spot


def check_alike(read: Read, first: Read, name: str, other: str, level: str) -> None:
    if read.structure != first.structure:
        raise InputError(
            f"{name} has other {level} data than {other}: {describe(read.rows)} against {describe(first.rows)} "
            "(only the number of rows may differ)."
        )
    if read.columns != first.columns:
        leaf = next(k for k, (a, b) in enumerate(zip(read.columns, first.columns, strict=True)) if a != b)
        apart = columns_apart(read.columns[leaf], first.columns[leaf], name, other)
        hint = "a row is the vector of its columns, so give all clients the same ones in the same order"
        raise InputError(f"{apart}, in its {level} rows{spot(read.paths[leaf], None)}: {hint}.")
    for leaf, (mine, theirs) in enumerate(zip(read.leaves, first.leaves, strict=True)):
        if mine.shape[1:] != theirs.shape[1:] or mine.dtype != theirs.dtype:
            place, said = spot(read.paths[leaf], None), [f"{describe(one)}" for one in (mine, theirs)]
            column = _other_type(read, first, leaf)
            if column is not None:
                place, said = spot(read.paths[leaf], (column[0],)), list(column[1:])
            raise InputError(
                f"{name} has other {level} data than {other}{place}: {said[0]} against {said[1]} "
                "(only the number of rows may differ)."
            )


def check_levels(name: str, inner: Read, outer: Read) -> None:
    """Refuse tables at the same place whose columns differ between the levels.

    Raises:
        InputError: with the column and the client.
    """
    if not any(columns is not None for columns in inner.columns):
        return
    tables = [
        {path: columns for path, columns, leaf in zip(one.paths, one.columns, one.leaves, strict=True) if leaf.ndim > 1}
        for one in (inner, outer)
    ]
    for path in tables[0].keys() & tables[1].keys():
        mine, theirs = tables[1][path], tables[0][path]
        if mine is None or theirs is None:
            continue
        apart = columns_apart(mine, theirs, "its outer table", "the inner one")
        check(
            not apart,
            f"{name}: {apart}{f', at {path}' if path else ''}: a row is the vector of its columns, in one "
            "order at both levels (or pass .to_numpy(), where they are meant to differ).",
        )


def _other_type(read: Read, first: Read, leaf: int) -> tuple[str, str, str] | None:
    """(A column that is of another type, its type, the first client's), if the leaf is a table."""
    mine, theirs = (jax.tree.leaves(one.given)[leaf] for one in (read, first))
    names = read.columns[leaf]
    if names is None or not (is_table(mine) and is_table(theirs)) or len(names) == 1:
        return None
    for name, one, other in zip(names, mine.dtypes, theirs.dtypes, strict=True):
        if one != other:
            return name, str(one), str(other)
    return None
