"""Tables as users have them, as pandas frames by client: frames of other libraries, files, folders, partitioners.

Other libraries are known by what their objects can do, and never imported.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from ..errors import InputError, check
from ..rows.values import shown

if TYPE_CHECKING:
    import pandas

_CSV, _PARQUET = (".csv", ".csv.gz", ".tsv"), (".parquet", ".pq")
_TAKEN = (
    "a pandas or polars table, the path of a CSV or Parquet file or of a folder of them, a Hugging Face Dataset, a "
    "flwr-datasets partitioner, or {client: one of these}"
)


class Partitioner(Protocol):
    """What deals a data set out to clients, as those of flwr-datasets do."""

    @property
    def num_partitions(self) -> int: ...

    def load_partition(self, partition_id: int) -> object: ...


def clients_of(source: object, client: str | None) -> dict[str, pandas.DataFrame]:
    """Each client's table, by the client's name; a whole number is called "client 3".

    Args:
        source: what `FederatedData.from_table` takes.
        client: the column that says whose a row is, which is left out; None: the source is by client.

    Raises:
        InputError: it is none of these, cannot be read, or does not say whose the rows are.
    """
    parts, by_client = _parts(source)
    check(parts, "there are no tables: pass one at least, with rows.")
    if client is None:
        check(
            by_client,
            lambda: (
                "client= is missing: name the column that says whose a row is, one of "
                f"{_listed(next(iter(parts.values())).columns)}; or pass {{client: table}}."
            ),
        )
        return parts
    found: dict[str, pandas.DataFrame] = {}
    whence: dict[str, str] = {}
    for name, frame in parts.items():
        for own, rows in _by_column(frame, client, name if by_client else "the table").items():
            check(
                own not in found,
                lambda own=own, name=name: (
                    f"client {shown(own)} has rows in {whence[own]} and in {name}: put each client's into one."
                ),
            )
            found[own], whence[own] = rows, name
    return found


def frame_of(table: object, name: str = "the table") -> pandas.DataFrame:
    """One table as a pandas frame whose columns' names are text, each there once.

    Raises:
        InputError: it is none, or two columns have one name.
    """
    import pandas

    if isinstance(table, pandas.DataFrame):
        frame = table
    elif isinstance(table, (str, os.PathLike)):
        frame = _file(Path(table))
    elif _of(table, "polars"):
        frame = _polars(table)
    elif _can(table, "to_pandas", "column_names"):  # Hugging Face's, pyarrow's
        frame = cast(pandas.DataFrame, getattr(table, "to_pandas")())  # noqa: B009
    else:
        raise InputError(f"{name} is a {type(table).__name__}: pass {_TAKEN}.")
    names = [str(column) for column in frame.columns]
    twice = sorted({column for column in names if names.count(column) > 1}) if len(set(names)) < len(names) else []
    check(not twice, lambda: f"{name} has two columns {twice[0]!r}: give each a name of its own.")
    check(names, f"{name} has no columns.")
    if names != list(frame.columns):
        frame = frame.set_axis(names, axis="columns")
    return frame


def client_name(value: object) -> str:
    """What a client is called whose rows are marked by a value: text as it is, a number as "client 3"."""
    if isinstance(value, str):
        return value
    return f"client {int(value)}" if isinstance(value, float) and value.is_integer() else f"client {value}"


def _parts(source: object) -> tuple[dict[str, pandas.DataFrame], bool]:
    """(Tables by name, whether each is a client's)."""
    if isinstance(source, (str, os.PathLike)) and Path(source).is_dir():
        return _folder(Path(source)), True
    if _of(source, "datasets") and isinstance(source, Mapping):
        raise InputError(f"a DatasetDict has the splits {_listed(source)}: pass one of them, such as dataset['train'].")
    if isinstance(source, Mapping):
        return {client_name(key): frame_of(table, client_name(key)) for key, table in source.items()}, True
    if isinstance(source, (list, tuple)):
        return {f"client {k}": frame_of(table, f"client {k}") for k, table in enumerate(source)}, True
    if _can(source, "num_partitions", "load_partition"):
        dealt = cast(Partitioner, source)
        count = int(dealt.num_partitions)
        return {f"client {k}": frame_of(dealt.load_partition(k), f"client {k}") for k in range(count)}, True
    return {"the table": frame_of(source, "the source")}, False


def _by_column(frame: pandas.DataFrame, client: str, name: str) -> dict[str, pandas.DataFrame]:
    """The rows of each client by a column of its name, without the column; clients in the order of their first rows."""
    check(len(frame) > 0, lambda: f"{name} has no rows: pass one that has.")
    known = lambda: f"{name} has no column {client!r} that says whose a row is: it has {_listed(frame.columns)}."
    check(client in frame.columns, known)
    missing = frame[client].isna().to_numpy()
    check(
        not missing.any(),
        lambda: (
            f"row {int(missing.argmax())} of {name} has nothing in column {client!r}, which says whose it is: fill "
            "it in or drop the row."
        ),
    )
    rest = frame.drop(columns=client)
    rows = {value: rest.iloc[places] for value, places in _places(frame[client]).items()}
    named = [client_name(value) for value in rows]
    twice = [one for one in named if named.count(one) > 1] if len(set(named)) < len(named) else []
    check(not twice, lambda: f"two clients of column {client!r} are called {twice[0]!r}: write each in one way.")
    return dict(zip(named, rows.values(), strict=True))


def _places(column: pandas.Series) -> dict:
    """value -> the numbers of its rows, in order."""
    import numpy as np
    import pandas

    codes, values = pandas.factorize(column)
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(values)))[:-1]
    return dict(zip(list(values), np.split(order, ends), strict=True))


def _folder(folder: Path) -> dict[str, pandas.DataFrame]:
    """The tables of a folder by their files' names, without what they end in."""
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        end = _end(file)
        if end is None or file.name.startswith("."):
            continue
        name = file.name[: -len(end)]
        check(
            name not in files,
            lambda name=name, file=file: (
                f"client {name!r} has two files in {folder}, {files[name].name} and {file.name}: leave one."
            ),
        )
        files[name] = file
    check(files, f"there is no CSV or Parquet file in {folder}: put one for each client there.")
    return {name: frame_of(file, name) for name, file in files.items()}


def _end(file: Path) -> str | None:
    return next((end for end in (*_CSV, *_PARQUET) if file.name.lower().endswith(end)), None)


def _file(file: Path) -> pandas.DataFrame:
    import pandas

    end = _end(file)
    check(file.is_file(), f"there is no file {file}: name a CSV or Parquet file, or a folder of them.")
    check(
        end is not None,
        f"{file} is neither CSV nor Parquet, by its name: it must end in .csv, .csv.gz, .tsv, .parquet.",
    )
    if end in _PARQUET:
        there = importlib.util.find_spec("pyarrow") is not None
        check(there, f"{file} is a Parquet file, which needs pyarrow: pip install 'fedbilevel[tables]'.")
        return _read(file, pandas.read_parquet)
    return _read(file, lambda path: _csv(path, "\t" if end == ".tsv" else ","))


def _csv(file: Path, separator: str) -> pandas.DataFrame:
    """A CSV file; pandas would rename the second of two columns of one name."""
    import pandas

    names = list(map(str, pandas.read_csv(file, sep=separator, header=None, nrows=1, dtype=str).iloc[0]))
    twice = [name for name in names if names.count(name) > 1]
    check(not twice, lambda: f"{file} has two columns {twice[0]!r}: give each a name of its own.")
    return pandas.read_csv(file, sep=separator, low_memory=False)


def _read(file: Path, how: Callable[[Path], pandas.DataFrame]) -> pandas.DataFrame:
    try:
        return how(file)
    except InputError:
        raise
    except Exception as error:  # whatever is in the file
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file} cannot be read as a table ({type(error).__name__}: {text}): check it.") from error


def _polars(table: object) -> pandas.DataFrame:
    """A polars frame, column by column: polars' own `to_pandas` needs pyarrow."""
    import pandas

    if _can(table, "collect"):  # a LazyFrame
        table = getattr(table, "collect")()  # noqa: B009
    if not _can(table, "iter_columns"):
        raise InputError(f"the table is a polars {type(table).__name__}: pass a polars DataFrame.")
    columns = {}
    for series in getattr(table, "iter_columns")():  # noqa: B009
        numeric = series.dtype.is_numeric() and not series.dtype.is_decimal()
        columns[series.name] = series.to_numpy() if numeric else pandas.Series(series.to_list(), dtype=object)
    return pandas.DataFrame(columns)


def _of(value: object, library: str) -> bool:
    return any(kind.__module__.partition(".")[0] == library for kind in type(value).__mro__)


def _can(value: object, *names: str) -> bool:
    """Whether it has all of these, without asking for any."""
    return all(hasattr(type(value), name) or name in getattr(value, "__dict__", {}) for name in names)


def _listed(names: Iterable) -> str:
    words = [repr(str(name)) for name in names]
    return ", ".join(words[:6]) + (f" and {len(words) - 6} more" if len(words) > 6 else "")
