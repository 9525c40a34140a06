"""Tables of clients in one process: agreed on as sites do over a network, and made rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError, check
from ..rows.halves import by_kind, check_share, halves
from ..rows.joined import Chosen
from ..rows.values import Whose, shown
from . import measured, schema
from .columns import check_named, texts_of
from .prepared import Prepared, settled
from .reading import client_name, clients_of, frame_of
from .wanted import Prepare

if TYPE_CHECKING:
    import pandas

Rows = dict[str, np.ndarray]
Halves = tuple["pandas.DataFrame", "pandas.DataFrame"]
_MANY = 20  # clients, whose tables are rather taken at once
_CLASSES = 20  # of numbers with fractions: more are no classes


def prepare(tables: object, wanted: Prepare) -> tuple[dict[str, tuple[Rows, Rows]], Prepared]:
    """Have clients agree on what their tables have in common, and make rows of them, as sites do over a network.

    What travels there is said by `Prepare`; it comes from inner rows alone, and is what the pooled inner rows would
    say (means and deviations to 1e-10 of the deviation), however clients' rows are weighted.

    Args:
        tables: {client: (inner table, outer table)}, or {client: table} where all rows are inner ones. A table is what
            `FederatedData.from_table` takes.
        wanted: what is wanted of them.

    Returns:
        {client: (inner rows, outer rows)}, as `FederatedData.stack` takes each level, and how they were made; of a client
        without outer rows the second is of no rows.

    Raises:
        InputError: tables that are none, of other columns than another client's, or with what cannot be made a number.
    """
    check(isinstance(wanted, Prepare), f"prepare takes a fedbilevel.Prepare; got {shown(wanted)}.")
    good = isinstance(tables, Mapping) and len(tables) > 0
    check(good, lambda: f"tables are {{client: (inner table, outer table)}}; got {shown(tables)}.")
    assert isinstance(tables, Mapping)
    both: dict[str, Halves] = {}
    for key, pair in tables.items():
        name = client_name(key)
        check(name not in both, f"two clients are called {name!r}: give each a name of its own.")
        two = isinstance(pair, tuple)
        check(
            not two or len(pair) == 2, f"{name} has {len(pair) if two else 1} tables: pass (inner table, outer table)."
        )
        frames = [frame_of(each, name) for each in (pair if two else (pair,))]
        both[name] = (frames[0], frames[1] if two else frames[0].iloc[:0])
    return prepared_rows(both, wanted)


def prepared_rows(
    both: Mapping[str, Halves], wanted: Prepare, ignored: Sequence[str] = ()
) -> tuple[dict[str, tuple[Rows, Rows]], Prepared]:
    """As `prepare`, of pandas frames."""
    found = agreed(both, wanted, ignored)
    many = _at_once(found, both) if len(both) >= _MANY else None
    return many or {name: rows_of(found, halves, name) for name, halves in both.items()}, found


def agreed(both: Mapping[str, Halves], wanted: Prepare, ignored: Sequence[str] = ()) -> Prepared:
    """What clients agree on."""
    common = schema.agree({name: schema.describe(*halves, wanted, name) for name, halves in both.items()}, wanted)
    told = {name: measured.measure(inner, common, wanted, name) for name, (inner, _) in both.items()}
    return settled(common, measured.together(told, common), wanted, ignored)


def rows_of(prepared: Prepared, halves: Halves, name: str) -> tuple[Rows, Rows]:
    """A client's rows at both levels."""
    label = prepared.label is not None
    one, other = (
        prepared.numbers(frame, Whose(name, f"{level} rows"), label)
        for frame, level in zip(halves, ("inner", "outer"), strict=True)
    )
    return one, other


def _at_once(prepared: Prepared, both: Mapping[str, Halves]) -> dict[str, tuple[Rows, Rows]] | None:
    """All clients' rows, from one table of all; None where columns differ in type or order, or one is to be named."""
    import pandas

    frames = [frame for halves in both.values() for frame in halves]
    kinds = {(*frame.columns, *frame.dtypes) for frame in frames}
    if len(kinds) > 1:
        return None
    try:
        rows = prepared.numbers(pandas.concat(frames), Whose("a client", "table"), prepared.label is not None)
    except InputError:
        return None
    ends = np.cumsum([len(frame) for frame in frames])[:-1]
    parts = {name: np.split(leaf, ends) for name, leaf in rows.items()}
    of = lambda place: {name: part[place] for name, part in parts.items()}
    return {name: (of(2 * k), of(2 * k + 1)) for k, name in enumerate(both)}


# Split --------------------------------------------------------------------------------------------------------------


def split(
    source: object, client: str | None, outer: float, stratify: bool | str | None, label: str | None,
    seeds: Callable[[int], np.ndarray],
) -> dict[str, Halves]:  # fmt: skip
    """Each client's (inner table, outer table), of what `FederatedData.from_table` takes.

    Args:
        seeds: (clients, words) of a number of clients.

    Raises:
        InputError: see there.
    """
    outer = check_share(outer)
    tables = clients_of(source, client)
    names = list(tables)
    for name, frame in tables.items():
        check(
            len(frame) >= 2,
            lambda name=name, frame=frame: (
                f"{name} has {len(frame)} rows, but a split needs at least 2: one for each level."
            ),
        )
    of = seeds(len(names))
    if stratify is None or stratify is False:
        chosen = halves(np.array([len(frame) for frame in tables.values()]), outer, of)
    else:
        check(
            stratify is not True or label is not None,
            "stratify=True goes by the label, and there is none: name a column, stratify='column', or say label=.",
        )
        by = str(label) if stratify is True else str(stratify)
        chosen = by_kind([_kinds(frame, by, name) for name, frame in tables.items()], outer, of)
    one, other = (_taken(each, tables) for each in chosen)
    return {name: (one[name], other[name]) for name in names}


def _kinds(frame: pandas.DataFrame, by: str, name: str) -> np.ndarray:
    """(rows,) the kind of each row, by a column; missing is a kind of its own."""
    check_named([by], list(frame.columns), name, "stratify")
    column = frame[by]
    codes, texts = texts_of(column, Whose(name, "table"), by)
    if column.dtype.kind == "f" and len(texts) > _CLASSES and not (column.dropna() % 1 == 0).all():
        raise InputError(
            f"{name} has {len(texts):,} different numbers in column {by!r}, which are no classes to stratify by: leave "
            "stratify= out, or name another column."
        )
    return np.where(codes < 0, len(texts), codes)


def _taken(chosen: Chosen, tables: Mapping[str, pandas.DataFrame]) -> dict[str, pandas.DataFrame]:
    rows = np.split(chosen.rows, np.cumsum(chosen.counts)[:-1])
    return {name: frame.iloc[own] for (name, frame), own in zip(tables.items(), rows, strict=True)}
