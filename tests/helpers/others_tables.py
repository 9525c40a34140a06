"""Run by a Python that has polars, pyarrow, datasets and flwr-datasets: their tables are the rows that pandas' are.

Everything is local: no hub is asked.
"""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import jax
import numpy as np
import pandas as pd
import polars as pl
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, NaturalIdPartitioner

import fedbilevel as fb

FOLDER = Path(sys.argv[1])
HOW = {"label": "default", "stratify": True, "key": jax.random.key(4)}


def table() -> pd.DataFrame:
    draw, rows = np.random.default_rng(0), 400
    frame = pd.DataFrame({
        "bank": draw.choice(["north", "east", "south"], rows), "age": draw.normal(40, 10, rows),
        "rooms": draw.integers(1, 5, rows), "job": draw.choice(["clerk", "boss", "nurse"], rows),
        "owner": draw.random(rows) < 0.5, "default": draw.integers(0, 2, rows),
    })  # fmt: skip
    frame.loc[draw.random(rows) < 0.2, "age"] = np.nan
    frame.loc[draw.random(rows) < 0.1, "job"] = None
    return frame


FRAME = table()
EXPECTED = fb.FederatedData.from_table(FRAME, client="bank", **HOW)
PARTS = {bank: part.drop(columns="bank") for bank, part in FRAME.groupby("bank", sort=False)}


def same(what: str, source: object, client: str | None = "bank", **how) -> None:
    data = fb.FederatedData.from_table(source, client=client, **{**HOW, **how})
    assert data.prepared.columns == EXPECTED.prepared.columns, what
    for own, other in zip(jax.tree.leaves(data), jax.tree.leaves(EXPECTED), strict=True):
        np.testing.assert_array_equal(own, other, err_msg=what)
    print(what, data.names)


same("polars", pl.from_pandas(FRAME))
same("polars, lazily", pl.from_pandas(FRAME).lazy())
same("polars' categories", pl.from_pandas(FRAME).with_columns(pl.col("job").cast(pl.Categorical)))
FRAME.to_parquet(FOLDER / "all.parquet")
same("Parquet", FOLDER / "all.parquet")
(FOLDER / "banks").mkdir()
for bank, part in PARTS.items():
    pl.from_pandas(part).write_parquet(FOLDER / "banks" / f"{bank}.parquet")
same("a folder of Parquet", {bank: FOLDER / "banks" / f"{bank}.parquet" for bank in PARTS}, None)
assert fb.FederatedData.from_table(FOLDER / "banks", **HOW).names == ("east", "north", "south")
same("pyarrow's types", FRAME.convert_dtypes(dtype_backend="pyarrow"))

whole = datasets.Dataset.from_pandas(FRAME)
whole.save_to_disk(FOLDER / "saved")
local = datasets.load_from_disk(FOLDER / "saved")
same("datasets", local)
by_bank = NaturalIdPartitioner(partition_by="bank")
by_bank.dataset = local
found = fb.FederatedData.from_table(by_bank, drop=["bank"], **HOW)
assert sorted(found.count("inner")) == sorted(EXPECTED.count("inner")) and found.names[2] == "client 2"
np.testing.assert_array_equal(
    by_bank.load_partition(0)["default"], PARTS[by_bank.partition_id_to_natural_id[0]]["default"]
)
for dealt in (
    IidPartitioner(num_partitions=4),
    DirichletPartitioner(num_partitions=4, partition_by="default", alpha=5.0),
):
    dealt.dataset = local
    own = fb.FederatedData.from_table(dealt, drop=["bank"], **HOW)
    assert own.clients == 4 and int((own.count("inner") + own.count("outer")).sum()) == len(FRAME)
    print(type(dealt).__name__, own.count("inner"))
try:
    fb.FederatedData.from_table(datasets.DatasetDict({"train": local}), **HOW)
except fb.InputError as error:
    assert "pass one of them" in str(error)
else:
    raise AssertionError("splits are no clients")
print("all of them")
