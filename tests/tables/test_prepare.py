"""Tables of clients become rows by what their pooled inner rows would say, and nothing else travels."""

from __future__ import annotations

import re
import warnings

import jax
import numpy as np
import pandas as pd
import pytest

import fedbilevel as fb
from fedbilevel.tables import measured, schema
from fedbilevel.tables.prepare import split
from fedbilevel.tables.prepared import read, settled
from helpers.checks import unchecked

KEY = jax.random.key(3)
JOBS = ["clerk", "boss", "nurse"]


def table(rows=240, seed=0):
    draw = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "bank": draw.choice(["north", "east", "south"], rows, p=[0.6, 0.3, 0.1]),
            "age": draw.normal(40, 10, rows).round(1),
            "account": 1e9 + draw.normal(size=rows),
            "job": draw.choice(JOBS, rows),
            "owner": draw.random(rows) < 0.3,
            "rooms": draw.integers(1, 7, rows),
            "default": draw.integers(0, 2, rows),
        }
    )
    frame.loc[draw.random(rows) < 0.2, "age"] = np.nan
    frame.loc[draw.random(rows) < 0.1, "job"] = None
    return frame


TABLE = table()


def halves(frame=TABLE, **how):
    """The pooled (inner, outer) rows as `from_table` splits them, before anything is made of them."""
    pairs = split(frame, "bank", 0.3, None, "default", lambda n: fb.data.folds(KEY, n), **how)
    return [pd.concat([pair[level] for pair in pairs.values()]) for level in (0, 1)]


def made(frame=TABLE, **how):
    return fb.FederatedData.from_table(frame, **{"client": "bank", "label": "default", "key": KEY, **how})


def refused(sentence, call):
    with pytest.raises(fb.InputError) as error, unchecked():
        call()
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    assert re.search(sentence, text), text


# Right -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights", [None, "rows", {"north": 1.0, "east": 5.0, "south": 0.1}], ids=["alike", "rows", "given"]
)
def test_it_is_what_the_pooled_inner_rows_say(weights):
    data, (inner, outer) = made(weights=weights), halves()
    columns = {column.name: column for column in data.prepared.table}
    for name in ("age", "account", "rooms"):
        known = inner[name].dropna().to_numpy(np.float64)
        own = columns[name]
        off = (known - known[0]).mean()  # the pooled mean, to more than a float64
        assert own.moments.count == len(known)
        assert abs((own.mean - known[0]) + own.moments.rest - off) < 1e-10
        assert abs(own.deviation - (known - known[0]).std()) < 1e-10
    usual = inner["job"].value_counts().idxmax()
    for level, frame in (("inner", inner), ("outer", outer)):
        expected = np.column_stack(
            [
                *(
                    (frame[name].fillna(columns[name].mean) - columns[name].mean) / columns[name].deviation
                    for name in ("age", "account")
                ),
                *(frame["job"].fillna(usual) == job for job in sorted(JOBS)),
                np.zeros(len(frame)),
                frame["owner"],
                (frame["rooms"] - columns["rooms"].mean) / columns["rooms"].deviation,
            ]
        )
        rows = getattr(data, level).rows
        np.testing.assert_allclose(rows["a"], expected, atol=2e-6)
        np.testing.assert_array_equal(rows["b"], frame["default"])
        assert rows["a"].dtype == np.float32 and rows["b"].dtype == np.int32
        assert data.columns(level) == {"['a']": data.prepared.columns}
    assert data.prepared.columns == (
        "age", "account", "job=boss", "job=clerk", "job=nurse", "job=other", "owner", "rooms",
    )  # fmt: skip
    assert data.names == tuple(TABLE["bank"].unique())


def test_outer_rows_say_nothing():
    changed = TABLE.copy()
    _, outer = halves()
    changed.loc[outer.index, ["age", "job", "rooms"]] = [1e5, "spy", 9]
    assert made(changed).prepared == made().prepared


def test_it_is_split_as_rows_are():
    frames = dict(iter(TABLE.groupby("bank", sort=False)))
    plain = fb.FederatedData.split({n: {"b": f["default"].to_numpy()} for n, f in frames.items()}, 0.3, KEY)
    np.testing.assert_array_equal(plain.outer.rows["b"], made().outer.rows["b"])
    one = fb.FederatedData.split({n: {"a": np.arange(len(f))} for n, f in frames.items()}, 0.3, KEY)
    numbered = made(TABLE.assign(number=TABLE.groupby("bank").cumcount()), prepare=fb.Prepare(scale=None))
    place = numbered.prepared.columns.index("number")
    np.testing.assert_array_equal(numbered.inner.rows["a"][:, place], one.inner.rows["a"])


def test_clients_as_files_tables_and_a_column_are_the_same():
    by_name = {name: rows.drop(columns="bank") for name, rows in TABLE.groupby("bank", sort=False)}
    one, other = made(), fb.FederatedData.from_table(by_name, label="default", key=KEY)
    for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert one.names == other.names
    pairs = split(by_name, None, 0.3, None, None, lambda n: fb.data.folds(KEY, n))
    rows, prepared = fb.prepare(pairs, fb.Prepare(label="default"))
    assert prepared == other.prepared
    stacked = fb.FederatedData.stack({n: r[0] for n, r in rows.items()}, {n: r[1] for n, r in rows.items()})
    np.testing.assert_array_equal(stacked.outer.rows["a"], other.outer.rows["a"])


def test_many_clients_are_taken_at_once(monkeypatch):
    by_name = {name: rows.drop(columns="bank") for name, rows in TABLE.groupby("bank")}
    pairs = {name: (rows[8:], rows[:8]) for name, rows in by_name.items()}
    one, _ = fb.prepare(pairs, fb.Prepare(label="default"))
    monkeypatch.setattr("fedbilevel.tables.prepare._MANY", 2)
    monkeypatch.setattr("fedbilevel.tables.prepare.rows_of", None)
    other, _ = fb.prepare(pairs, fb.Prepare(label="default"))
    assert list(one) == list(other)
    for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    monkeypatch.undo()
    monkeypatch.setattr("fedbilevel.tables.prepare._MANY", 2)
    pairs["east"][1].loc[:, "age"] = np.inf
    refused("east has an infinite number .* in its outer rows", lambda: fb.prepare(pairs, fb.Prepare(label="default")))


def test_the_order_of_clients_and_of_columns_changes_nothing():
    by_name = {name: rows.drop(columns="bank") for name, rows in TABLE.groupby("bank")}
    turned = {name: by_name[name][by_name[name].columns[:: (-1) ** k]] for k, name in enumerate(reversed(by_name))}
    both = [{name: (rows, rows) for name, rows in tables.items()} for tables in (by_name, turned)]
    (rows, one), (others, other) = (fb.prepare(tables, fb.Prepare(label="default")) for tables in both)
    known = lambda prepared: {column.name: column for column in prepared.table}
    assert known(one) == known(other)
    order = [other.columns.index(name) for name in one.columns]
    np.testing.assert_array_equal(others["east"][0]["a"][:, order], rows["east"][0]["a"])


def test_strata():
    rare = TABLE.assign(default=(np.arange(len(TABLE)) % 10 == 0).astype(int))
    for how in ({"stratify": True}, {"stratify": "default", "drop": []}):
        data = made(rare, **how)
        for name, client in zip(data.names, range(3), strict=True):
            several = rare[rare["bank"] == name]["default"]
            held = np.asarray(data.outer.alone(client).rows["b"])
            assert len(held) == int(np.rint(0.3 * len(several)))
            assert abs(held.sum() - 0.3 * several.sum()) < 1
    gone = made(rare, stratify="owner", drop=["owner", "bank"])  # the clients' column is none of a row's in any case
    assert "owner" not in gone.prepared.columns
    one = made(TABLE.assign(owner=True), stratify="owner")
    np.testing.assert_array_equal(one.inner.rows["b"], made(TABLE.assign(owner=True)).inner.rows["b"])


def test_an_array_a_column():
    hot, codes = made(columns="separate"), made(prepare=fb.Prepare(encode="codes"), columns="separate")
    assert set(hot.inner.rows) == {"age", "account", "job", "owner", "rooms", "default"}
    assert hot.inner.rows["job"].shape[1] == 4 and codes.inner.rows["job"].dtype == np.int32
    np.testing.assert_array_equal(hot.inner.rows["job"].argmax(1), codes.inner.rows["job"])
    together = made()
    np.testing.assert_array_equal(hot.inner.rows["age"], together.inner.rows["a"][:, 0])
    assert hot.columns("inner") == {"['job']": ("job=boss", "job=clerk", "job=nurse", "job=other")}
    assert made(prepare=fb.Prepare(encode="codes")).prepared.columns[2] == "job"


def test_fills():
    fills = {"age": -1.0, "job": "nobody", "rooms": "most frequent"}
    data, (inner, _) = made(prepare=fb.Prepare(fill=fills, scale=None, min_count=2)), halves()
    rows, missing = np.asarray(data.inner.rows["a"]), inner["age"].isna().to_numpy()
    assert (rows[missing, 0] == -1).all() and (rows[~missing, 0] > 0).all()
    other = data.prepared.columns.index("job=other")
    np.testing.assert_array_equal(rows[:, other], inner["job"].isna())
    holes = TABLE.assign(rooms=TABLE["rooms"].where(TABLE.index % 5 > 0))
    usual = made(holes, drop=["account"], prepare=fb.Prepare(fill="most frequent"))
    often = {column.name: column for column in usual.prepared.table}
    counts = halves(holes)[0]["rooms"].value_counts()
    assert counts[often["rooms"].fill] == counts.max()
    assert often["owner"].fill == 0.0
    constant = made(prepare=fb.Prepare(fill=7, scale=None))
    assert (np.asarray(constant.inner.rows["a"])[missing, 0] == 7).all()


def test_a_range():
    data, (inner, _) = made(prepare=fb.Prepare(scale="range", share=("extremes",))), halves()
    rows = np.asarray(data.inner.rows["a"])
    assert rows[:, 0].min() == 0 and rows[:, 0].max() == 1
    assert data.prepared.table[0].extremes == (inner["age"].min(), inner["age"].max())
    assert made().prepared.table[0].extremes is None


def test_rare_categories_and_those_of_one_client_are_others():
    frame = TABLE.assign(job=TABLE["job"].mask(TABLE["bank"] == "east", "spy"))
    frame.loc[frame["bank"] == "south", "job"] = "nurse"
    inner, _ = halves(frame)
    counts = inner["job"].value_counts()
    assert made(frame).prepared.columns[2:4] == ("job=nurse", "job=other")  # the rest is north's or east's alone
    shared = made(frame, prepare=fb.Prepare(share=("categories",))).prepared
    assert shared.columns[2:7] == ("job=boss", "job=clerk", "job=nurse", "job=spy", "job=other")
    rare = int(counts["spy"]) + 1
    few = made(frame, prepare=fb.Prepare(share=("categories",), min_count=rare)).prepared
    assert "job=spy" not in few.columns
    alone = made(frame[frame["bank"] == "east"])
    assert alone.prepared.columns[2:4] == ("job=spy", "job=other")


def test_codes_are_categories_if_said():
    as_codes = made(TABLE.assign(rooms=TABLE["rooms"].astype(float)), prepare=fb.Prepare(categories=["rooms"])).prepared
    assert [name for name in as_codes.columns if name.startswith("rooms")] == [
        *(f"rooms={k}" for k in range(1, 7)), "rooms=other",
    ]  # fmt: skip


KINDS = {
    "nullable": lambda f: f.convert_dtypes(),
    "categories": lambda f: f.assign(job=f["job"].astype("category")),
    "objects": lambda f: f.astype({"job": object, "owner": object, "rooms": object}),
    "float32": lambda f: f.astype({"rooms": "float32"}),
    "Int64": lambda f: f.astype({"rooms": "Int64", "default": "Int8", "owner": "boolean"}),
    "sparse": lambda f: f.assign(rooms=f["rooms"].astype("Sparse[int64]"), age=f["age"].astype("Sparse[float64]")),
    "clients as categories": lambda f: f.assign(bank=f["bank"].astype("category")),
    "indexed": lambda f: f.set_index(np.arange(len(f))[::-1] * 7),
    "text labels as numbers": lambda f: f.assign(default=f["default"].astype(bool)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_other_types_are_the_same_rows(kind):
    other, own = made(KINDS[kind](TABLE)), made()
    assert other.prepared == own.prepared
    for mine, theirs in zip(jax.tree.leaves(own), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_missing_booleans_are_their_mean_however_they_are_held():
    gone = TABLE.index % 7 == 0
    held = [
        TABLE.assign(owner=TABLE["owner"].astype(kind).mask(gone)) for kind in (object, "boolean", float)
    ]  # as numbers they are 1.0 and 0.0
    one, other, numbers = (made(frame, prepare=fb.Prepare(scale=None)) for frame in held)
    assert one.prepared == other.prepared and one.prepared.table[3].kind == "boolean"
    place = one.prepared.columns.index("owner")
    inner, _ = halves(held[1])
    filled = np.asarray(one.inner.rows["a"])[:, place][inner["owner"].isna()]
    np.testing.assert_allclose(filled, inner["owner"].mean(), rtol=1e-6)
    for mine in (other, numbers):
        np.testing.assert_array_equal(mine.inner.rows["a"], one.inner.rows["a"])


def test_dates_may_be_categories_if_said():
    frame = TABLE.assign(since=[f"2020-0{1 + k % 2}-17" for k in range(240)])
    columns = made(frame, prepare=fb.Prepare(categories=["since"])).prepared.columns
    assert columns[-3:] == ("since=2020-01-17", "since=2020-02-17", "since=other")


@pytest.mark.parametrize("other", ["Yes ", "YES", " yes"])
def test_classes_that_differ_in_blanks_or_capitals_are_refused(other):
    text = TABLE.assign(default=np.where(TABLE["default"] == 1, "yes", "no"))
    text.loc[(text["bank"] == "east") & (text["default"] == "yes"), "default"] = other
    with pytest.raises(
        fb.InputError, match=r"the label 'default' is '.*' at \w+ and '.*' at \w+, which differ in blanks"
    ):
        made(text)
    apart = made(text, prepare=fb.Prepare(classes=("no", "yes", other)))
    assert apart.prepared.classes == ("no", "yes", other)


def test_labels():
    text = TABLE.assign(default=np.where(TABLE["default"] == 1, "yes", "no"))
    text.loc[(text["bank"] == "east"), "default"] = "no"
    data = made(text)
    assert data.prepared.classes == ("no", "yes") and data.inner.rows["b"].dtype == np.int32
    north = data.names.index("north")
    assert set(np.asarray(data.inner.alone(north).rows["b"])) == {0, 1}
    turned = made(text, prepare=fb.Prepare(classes=("yes", "no")))
    np.testing.assert_array_equal(turned.inner.rows["b"], 1 - data.inner.rows["b"])
    assert made(TABLE.assign(default=TABLE["default"] + 0.5)).inner.rows["b"].dtype == np.float32
    assert set(made(label=None).inner.rows) == {"a"} and "default" in made(label=None).prepared.columns


def test_columns_constant_or_missing_at_one_client():
    frame = TABLE.copy()
    frame.loc[frame["bank"] == "south", "age"] = np.nan
    frame.loc[frame["bank"] == "east", ["age", "owner"]] = [33.0, True]
    frame.loc[frame["bank"] == "south", "job"] = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = made(frame)
    inner, _ = halves(frame)
    own = data.prepared.table[0]
    assert abs(own.deviation - inner["age"].std(ddof=0)) < 1e-10 and own.moments.count == inner["age"].count()
    with pytest.warns(fb.errors.FedbilevelWarning, match="'age' is 3 in all inner rows"):
        same = made(TABLE.assign(age=3))
    assert (np.asarray(same.inner.rows["a"])[:, 0] == 0).all()


# Refused ---------------------------------------------------------------------------------------------------------------


def north(**columns):
    """TABLE with other values at one client."""
    frame = TABLE.astype(dict.fromkeys(columns, object))
    for name, value in columns.items():
        frame.loc[frame["bank"] == "north", name] = value
    return frame


REFUSED = {
    "dates": (lambda: made(TABLE.assign(since=pd.Timestamp("2020-01-01"))), r"dates or times in its .*'since'.*drop="),
    "date objects": (lambda: made(TABLE.assign(since=pd.Timestamp("2020-01-01").date())), r"dates or times.*'since'"),
    "periods": (lambda: made(TABLE.assign(since=pd.Period("2020-01"))), "dates or times.*'since'"),
    "a mark for a missing number": (
        lambda: made(TABLE.assign(chol=["?" if n % 5 == 0 else str(n) for n in range(len(TABLE))])),
        r"numbers as text beside '\?' in its .*'chol'.*na_values=\['\?'\].*categories=\['chol'\]",
    ),
    "numbers as text": (
        lambda: made(TABLE.assign(chol=[f"{n}.5" for n in range(len(TABLE))])),
        r"numbers as text \(such as '0.5'\).*'chol'.*make them numbers, or",
    ),
    "dates as text": (
        lambda: made(TABLE.assign(since=[f"2020-0{1 + k % 9}-17" for k in range(240)])),
        r"dates as text \(such as '2020-01-17'\).*'since'.*days since a first day",
    ),
    "intervals": (lambda: made(TABLE.assign(age=pd.Interval(0, 1))), r"neither numbers nor text \(such as Interval"),
    "mixed": (
        lambda: made(TABLE.assign(age=TABLE["age"].astype(object).where(TABLE.index > 50, "?"))), "text and numbers.*'age'",
    ),
    "at one client": (lambda: made(north(age="old")), "'age' is text or categories at north and numbers at south"),
    "lists": (lambda: made(TABLE.assign(age=[[1]] * len(TABLE))), r"neither numbers nor text \(such as \[1\]\).*'age'"),
    "complex": (lambda: made(TABLE.assign(age=1j)), "values of complex128.*'age'"),
    "infinite": (lambda: made(north(rooms=np.inf)), r"north has an infinite number \(in row \d+\).*'rooms'"),
    "huge": (lambda: made(TABLE.assign(age=TABLE["rooms"] * 1e200)), "square is infinite.*'age'"),
    "all missing": (lambda: made(TABLE.assign(age=np.nan)), "'age' has no value in any client's"),
    "ids": (
        lambda: made(table(5000).assign(job=[f"id {k}" for k in range(5000)])), r"east has [\d,]+ different values.*'job'",
    ),
    "no category": (
        lambda: made(TABLE.assign(job=[f"id {k}" for k in range(240)])), "no category of column 'job'.*two clients",
    ),
    "duplicates": (
        lambda: made(pd.concat([TABLE, TABLE[["age"]]], axis=1)), "has two columns 'age': give each a name of its own"
    ),
    "label missing": (lambda: made(label="defualt"), "label= names a column 'defualt'.*does not have"),
    "missing labels": (lambda: made(north(default=None)), "north has .* missing labels .*'default'"),
    "drop": (lambda: made(drop=["agee"]), "drop= names a column 'agee'"),
    "one row": (lambda: made(pd.concat([TABLE, TABLE[:1].assign(bank="west")])), "west has 1 rows, but a split needs"),
    "outer=0": (lambda: made(outer=0), "outer= is the share.*got 0"),
    "outer=1": (lambda: made(outer=1.0), "outer= is the share.*got 1.0"),
    "no client": (lambda: made(client=None), "client= is missing: .*'bank'"),
    "client unknown": (lambda: made(client="bnak"), "no column 'bnak'"),
    "client missing": (
        lambda: made(TABLE.assign(bank=TABLE["bank"].where(TABLE.index != 17))), "row 17.*nothing in column 'bank'",
    ),
    "client twice": (
        lambda: made(TABLE.assign(bank=pd.Series([1, "client 1"] * 120, dtype=object))), "two clients.*'client 1'",
    ),
    "stratify": (lambda: made(stratify="age"), "different numbers in column 'age', which are no classes"),
    "stratify unknown": (lambda: made(stratify="sex"), "stratify= names a column 'sex'"),
    "stratify no label": (lambda: made(stratify=True, label=None), "stratify=True goes by the label"),
    "all dropped": (
        lambda: made(drop=["age", "account", "job", "owner", "rooms"]), "no column left beside the label",
    ),
    "label at one": (lambda: made(north(default="bad")), "the label 'default' is text at north and"),
    "classes": (lambda: made(prepare=fb.Prepare(classes=("0", "2"))), "the label '1'.*none of the classes"),
    "fill": (lambda: made(prepare=fb.Prepare(fill={"age": "none"})), "fill= for column 'age' is 'none'"),
    "fill unknown": (lambda: made(prepare=fb.Prepare(fill={"agee": 1})), "fill= names a column 'agee'"),
    "frequent": (
        lambda: made(table(9000), prepare=fb.Prepare(fill="most frequent")), "different values.*its mean or a number",
    ),
    "frequent once": (
        lambda: made(prepare=fb.Prepare(fill={"account": "most frequent"}, share=("categories",))),
        "no number of column 'account' is in two rows",
    ),
    "twice": (lambda: made(drop=["age"], prepare=fb.Prepare(drop=("job",))), "drop= is .* and prepare= says"),
    "kind": (lambda: made(prepare="mean"), "prepare= is a fedbilevel.Prepare"),
    "label dropped": (lambda: made(drop=["default"]), "'default' is the label and is dropped"),
    "three tables": (lambda: fb.prepare({"a": (TABLE, TABLE, TABLE)}, fb.Prepare()), "a has 3 tables"),
    "no tables": (lambda: fb.prepare({}, fb.Prepare()), "got {}"),
    "no inner rows": (lambda: fb.prepare({"a": (TABLE[:0], TABLE)}, fb.Prepare()), "a has no inner rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_named(case):
    call, sentence = REFUSED[case]
    refused(sentence, call)


WANTED = {
    "share": ({"share": ("counts",)}, "share="), "scale": ({"scale": "robust"}, "scale= is"),
    "range": ({"scale": "range"}, 'add share=\\("extremes",\\)'), "min_count": ({"min_count": 0}, "min_count="),
    "fill": ({"fill": "median"}, "fill= is"), "nan": ({"fill": float("nan")}, "fill= is"),
    "classes": ({"classes": ("a", "a"), "label": "b"}, "classes="), "drop": ({"drop": "age"}, "drop= is a list"),
    "columns": ({"columns": "apart"}, "columns= is"), "encode": ({"encode": "hash"}, "encode= is"),
    "label": ({"label": 3}, "label= is a column's name"),
}  # fmt: skip


@pytest.mark.parametrize("case", WANTED)
def test_what_cannot_be_wanted_is_refused(case):
    words, sentence = WANTED[case]
    refused(sentence, lambda: fb.Prepare(**words))


APART = {
    "renamed": (lambda f: f.rename(columns={"age": "Age"}), "north has a column 'age' where east has 'Age'"),
    "lacking": (lambda f: f.drop(columns="rooms"), "north has a column 'rooms' that east lacks"),
}  # fmt: skip


@pytest.mark.parametrize("case", APART)
def test_clients_whose_columns_differ_are_named(case):
    change, sentence = APART[case]
    by_name = {name: rows.drop(columns="bank") for name, rows in TABLE.groupby("bank")}
    by_name["east"] = change(by_name["east"])
    refused(sentence, lambda: fb.FederatedData.from_table(by_name, label="default"))


# New tables ------------------------------------------------------------------------------------------------------------


def test_new_tables_become_rows_as_the_old_did(tmp_path):
    data, (_, outer) = made(), halves()
    prepared = data.prepared
    again = prepared.rows(outer)
    np.testing.assert_array_equal(again["a"], data.outer.rows["a"])
    np.testing.assert_array_equal(again["b"], data.outer.rows["b"])
    raw = TABLE.loc[outer.index]  # with the column of clients, which is known
    turned = prepared.rows(raw[raw.columns[::-1]].drop(columns="default"))
    np.testing.assert_array_equal(turned["a"], again["a"])
    assert set(turned) == {"a"} and set(prepared.rows(outer, label=False)) == {"a"}
    new = prepared.rows(raw.assign(job="astronaut"))["a"]
    assert (new[:, prepared.columns.index("job=other")] == 1).all()
    prepared.save(tmp_path / "prepared.json")
    for path in (tmp_path, tmp_path / "prepared.json"):
        held = fb.load_prepared(path)
        assert held == prepared and held.digest == prepared.digest == read(prepared.text()).digest
    assert made(TABLE[TABLE["bank"] != "south"]).prepared.digest != prepared.digest
    one = jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), prepared.one())
    assert one == jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), again)


@pytest.mark.parametrize("how", [{"encode": "codes"}, {}, {"label": None}])
@pytest.mark.parametrize("columns", ["together", "separate"])
def test_one_row_is_like_all(columns, how):
    _, prepared = fb.prepare(
        {"a": TABLE.drop(columns="bank")}, fb.Prepare(**{"label": "default", "columns": columns, **how})
    )
    shape = lambda rows: {name: (leaf.shape[1:], leaf.dtype) for name, leaf in rows.items()}
    assert shape(prepared.one()) == shape(prepared.rows(TABLE.drop(columns="bank")))


NEW = {
    "unknown": (lambda f: f.assign(size=1), "the table has a column 'size' that what was prepared lacks"),
    "lacking": (lambda f: f.drop(columns="age"), "the table lacks a column 'age' that what was prepared has"),
    "text": (lambda f: f.assign(age="old"), "'old', which is no number, .*'age'"),
    "dates": (lambda f: f.assign(job=pd.Timestamp("2020-01-01")), "dates or times.*'job'"),
    "fractions": (lambda f: f.assign(default=0.5), "0.5 in its table, the label 'default'"),
    "no label": (lambda f: f.assign(default=None), "missing labels"),
}


@pytest.mark.parametrize("case", NEW)
def test_new_tables_that_do_not_fit_are_refused(case):
    change, sentence = NEW[case]
    prepared = made().prepared
    refused(sentence, lambda: prepared.rows(change(TABLE)))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": 1}', '{"version": 0}', None])
def test_files_that_hold_nothing_prepared(tmp_path, text):
    if text is not None:
        (tmp_path / "prepared.json").write_text(text)
    refused("no prepared table|no file|another version", lambda: fb.load_prepared(tmp_path / "prepared.json"))


# What travels ----------------------------------------------------------------------------------------------------------


def told(wanted, frame=TABLE):
    pairs = split(frame, "bank", 0.3, None, "default", lambda n: fb.data.folds(KEY, n))
    tables = {name: tuple(half for half in pair) for name, pair in pairs.items()}
    first = {name: schema.describe(*pair, wanted, name) for name, pair in tables.items()}
    common = schema.agree(first, wanted)
    second = {name: measured.measure(pair[0], common, wanted, name) for name, pair in tables.items()}
    return first, common, second


def test_words_come_back_as_they_were():
    wanted = fb.Prepare(label="default", share=("extremes", "categories"), fill="most frequent")
    coarse = TABLE.assign(age=TABLE["age"].round(-1), account=5.0 + TABLE["rooms"])
    first, common, second = told(wanted, coarse)
    for name, own in first.items():
        assert schema.Described.read(own.text(), name) == own
        assert measured.read(measured.text_of(second[name]), common, name) == second[name]
    heard = schema.Agreed.read(common.text())
    assert [(c.name, c.kind, c.kept) for c in heard.common] == [(c.name, c.kind, c.kept) for c in common.common]
    assert "counts" not in common.text()


@pytest.mark.parametrize(
    "wanted",
    [
        {}, {"share": ("extremes", "categories"), "scale": "range"}, {"min_count": 30}, {"categories": ["rooms"]},
        {"fill": {"rooms": "most frequent", "age": 3, "job": "nobody"}},
    ],
    ids=str,
)  # fmt: skip
def test_what_comes_of_words_on_a_wire_is_what_comes_of_tables(wanted):
    how = fb.Prepare(label="default", **wanted)
    labels = TABLE["default"].map(["no", "yes"].__getitem__)
    frame = TABLE.assign(job=TABLE["job"].where(TABLE["bank"] != "east", "spy"), default=labels)
    first, common, second = told(how, frame)
    heard = schema.agree({name: schema.Described.read(own.text(), name) for name, own in reversed(first.items())}, how)
    assert heard == common
    answers = {name: measured.read(measured.text_of(own), heard, name) for name, own in reversed(second.items())}
    prepared = settled(heard, measured.together(answers, heard), how, ("bank",))
    assert prepared == made(frame, prepare=how).prepared == read(prepared.text())


def test_no_number_of_a_row_travels_and_no_text_of_one_client_alone():
    frame = TABLE.assign(job=TABLE["job"].where(TABLE["bank"] != "east", "spy"))
    frame["age"] += np.random.default_rng(5).normal(size=len(frame))  # no mean is one of them by chance
    first, _, second = told(fb.Prepare(label="default"), frame)
    up = [own.text() for own in first.values()] + [measured.text_of(own) for own in second.values()]
    assert not [text for text in up if "spy" in text]
    ages = {repr(float(v)) for v in frame["age"].dropna()}
    numbers = {number for text in up for number in re.findall(r"-?\d+\.\d+", text)}
    assert not ages & numbers
    assert all(each.extremes is None for own in second.values() for each in own)
    assert "spy" in "".join(
        measured.text_of(own) for own in told(fb.Prepare(label="default", share=("categories",)), frame)[2].values()
    )


NONSENSE = [
    "",
    "{}",
    "[]",
    "[[]]",
    '{"columns": 3}',
    '{"columns": [{}], "label": "", "classes": []}',
    "null",
    "[" * 9999,
]


@pytest.mark.parametrize("text", NONSENSE, ids=range(len(NONSENSE)))
def test_words_that_make_no_sense_are_refused(text):
    _, common, _ = told(fb.Prepare(label="default"))
    for call in (
        lambda: schema.Described.read(text, "east"), lambda: measured.read(text, common, "east"),
        lambda: schema.Agreed.read(text),
    ):  # fmt: skip
        with pytest.raises(fb.RunError, match="cannot be read"):
            call()


def test_a_text_that_is_not_its_digest_s_is_refused():
    _, common, second = told(fb.Prepare(label="default"))
    text = measured.text_of(second["north"]).replace("clerk", "Clerk")
    with pytest.raises(fb.RunError, match="north described its table"):
        measured.read(text, common, "north")
    with pytest.raises(fb.RunError, match="north described its table"):
        measured.read(measured.text_of(second["north"]).replace('"centred":', '"centred":-'), common, "north")
