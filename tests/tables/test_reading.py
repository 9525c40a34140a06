"""Tables are read from whatever holds them; what other libraries' objects can do is played here by stand-ins."""

from __future__ import annotations

import datetime
import re

import numpy as np
import pandas as pd
import pytest

import fedbilevel as fb
from fedbilevel.tables.reading import clients_of, frame_of
from helpers.checks import unchecked

TABLE = pd.DataFrame({"site": ["a", "b", "a", "b", "c", "c"], "age": [1.0, 2, 3, 4, 5, np.nan], "job": list("xyxyxy")})
PARTS = {name: rows.drop(columns="site") for name, rows in TABLE.groupby("site")}


class Dataset:
    """As Hugging Face's."""

    def __init__(self, frame):
        self._frame = frame

    @property
    def column_names(self):
        return list(self._frame.columns)

    def to_pandas(self):
        return self._frame


class Partitioner:
    """As those of flwr-datasets."""

    num_partitions = 3

    def load_partition(self, partition_id):
        return Dataset(list(PARTS.values())[partition_id])


class DType:
    def __init__(self, name):
        self.name = name

    def is_numeric(self):
        return self.name in ("number", "decimal")

    def is_decimal(self):
        return self.name == "decimal"


class Column:
    def __init__(self, name, dtype, values):
        self.name, self.dtype, self.values = name, DType(dtype), values

    def to_numpy(self):
        return np.array([np.nan if value is None else value for value in self.values])

    def to_list(self):
        return self.values


class Polars:
    def __init__(self, columns):
        self._columns = columns

    def iter_columns(self):
        return iter(self._columns)


class Lazy:
    def __init__(self, frame):
        self._frame = frame

    def collect(self):
        return self._frame


Polars.__module__ = Lazy.__module__ = "polars.dataframe.frame"
POLARS = Polars([Column("site", "text", list(TABLE["site"])), Column("age", "number", [1.0, 2.0, 3.0, 4.0, 5.0, None]),
                 Column("job", "text", list(TABLE["job"]))])  # fmt: skip


def same(tables, names=("a", "b", "c")):
    assert tuple(tables) == names
    for own, other in zip(tables.values(), PARTS.values(), strict=True):
        pd.testing.assert_frame_equal(
            own.reset_index(drop=True), other.reset_index(drop=True), check_dtype=False, check_index_type=False
        )


def test_whatever_holds_tables(tmp_path):
    numbered = tuple(f"client {k}" for k in range(3))
    same(clients_of(TABLE, "site"))
    same(clients_of(PARTS, None))
    same(clients_of(list(PARTS.values()), None), numbered)
    same(clients_of({k: Dataset(part) for k, part in enumerate(PARTS.values())}, None), numbered)
    same(clients_of(Dataset(TABLE), "site"))
    same(clients_of(Partitioner(), None), numbered)
    same(clients_of(POLARS, "site"))
    same(clients_of(Lazy(POLARS), "site"))
    TABLE.to_csv(tmp_path / "all.csv", index=False)
    same(clients_of(tmp_path / "all.csv", "site"))
    same(clients_of(str(tmp_path / "all.csv"), "site"))
    TABLE.to_csv(tmp_path / "all.tsv", index=False, sep="\t")
    same(clients_of(tmp_path / "all.tsv", "site"))
    folder = tmp_path / "sites"
    folder.mkdir()
    for name, end in (("a", ".csv"), ("b", ".csv.gz"), ("c", ".csv")):
        PARTS[name].to_csv(folder / f"{name}{end}", index=False)
    (folder / "README.md").write_text("notes")
    same(clients_of(folder, None))
    same(clients_of({"a": folder / "a.csv", "b": PARTS["b"], "c": Dataset(PARTS["c"])}, None))
    several = tmp_path / "regions"
    several.mkdir()
    TABLE[TABLE["site"] != "c"].to_csv(several / "north.csv", index=False)
    TABLE[TABLE["site"] == "c"].to_csv(several / "south.csv", index=False)
    same(clients_of(several, "site"))


def test_numbers_name_clients():
    sites = TABLE.assign(site=[7, 2, 7, 2, 0, 0])
    same(clients_of(sites, "site"), ("client 7", "client 2", "client 0"))
    same(clients_of(sites.astype({"site": float}), "site"), ("client 7", "client 2", "client 0"))


def test_decimals_and_dates_of_polars_are_told_apart():
    days = [datetime.date(2020, 1, 1)] * 6
    frame = frame_of(Polars([Column("when", "date", days), Column("cost", "decimal", [1] * 6)]))
    assert frame["when"].dtype == object and list(frame["when"]) == days


def refused(sentence, call):
    with pytest.raises(fb.InputError) as error, unchecked():
        call()
    assert re.search(sentence, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    refused("there is no file .*none.csv", lambda: clients_of(tmp_path / "none.csv", "site"))
    (tmp_path / "a.txt").write_text("x")
    refused("neither CSV nor Parquet", lambda: clients_of(tmp_path / "a.txt", "site"))
    refused("no CSV or Parquet file in", lambda: clients_of(tmp_path, None))
    (tmp_path / "a.csv").write_text("site,age,age\na,1,2\n")
    refused("a.csv has two columns 'age'", lambda: clients_of(tmp_path / "a.csv", "site"))
    (tmp_path / "a.csv").write_text("")
    refused("a.csv cannot be read as a table", lambda: clients_of(tmp_path / "a.csv", "site"))
    (tmp_path / "a.csv").write_text("age\n1\n")
    (tmp_path / "a.tsv").write_text("age\n1\n")
    refused("client 'a' has two files in .*: a.csv and a.tsv|a.csv and a.tsv", lambda: clients_of(tmp_path, None))
    both = tmp_path / "both"
    both.mkdir()
    for name in ("one", "two"):
        TABLE.to_csv(both / f"{name}.csv", index=False)
    refused("client 'a' has rows in one and in two", lambda: clients_of(both, "site"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "a.parquet").write_text("x")
    refused(r"needs pyarrow: pip install 'fedbilevel\[tables\]'", lambda: clients_of(tmp_path / "a.parquet", "site"))


def test_what_holds_no_table_is_refused():
    refused("the source is a int: pass a pandas or polars table", lambda: clients_of(3, "site"))
    refused("a is a list", lambda: clients_of({"a": [1, 2]}, None))
    refused("there are no tables", lambda: clients_of({}, None))
    refused("has no columns", lambda: clients_of(pd.DataFrame(), "site"))
    splits = type("DatasetDict", (dict,), {"__module__": "datasets.dataset_dict"})
    refused(r"splits 'train', 'test': pass one of them", lambda: clients_of(splits(train=1, test=2), None))
    series = type("Series", (), {"__module__": "polars.series"})
    refused("polars Series", lambda: clients_of(series(), None))
