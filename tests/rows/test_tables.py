"""Tables keep the names of their columns: compared between clients and levels, and in every message about values."""

from __future__ import annotations

import re
import warnings

import jax
import numpy as np
import pandas as pd
import pytest

import fedbilevel as fb
from fedbilevel.app import apart, load_app, placeholder, schema
from helpers import apps
from helpers.network import call

SITES = ["site-1", "site-2", "site-3"]
KEY = jax.random.key(0)
GOOD = pd.DataFrame({"age": [61.0, 40.0, 55.0, 70.0], "bmi": [22.5, 31.0, 27.0, 24.0], "ill": [0, 1, 1, 0]})
SWAPPED = GOOD[["bmi", "age", "ill"]]


def but(**columns):
    """GOOD with other columns."""
    return GOOD.assign(**columns)


def refused(call, *words):
    with pytest.raises(fb.InputError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    assert not [word for word in words if not re.search(word, text)], text


def calls(other, under=lambda rows: (rows,)):
    """Every way in which east's rows may come, beside north's."""
    north, east = under(GOOD), under(other)
    return [
        lambda: fb.FederatedData.stack({"north": north, "east": east}, {"north": north, "east": north}),
        lambda: fb.FederatedData.stack([north, north], [north, east], names=["north", "east"]),
        lambda: fb.FederatedData.split({"north": north, "east": east}, 0.5, KEY),
    ]


def test_a_row_is_the_vector_of_its_columns():
    data = fb.FederatedData.split([GOOD, GOOD], 0.25, KEY)
    pooled = np.concatenate([data.inner.alone(0).rows, data.outer.alone(0).rows])
    assert sorted(map(tuple, pooled)) == sorted(map(tuple, GOOD.to_numpy()))
    assert data.columns("inner") == data.columns("outer") == {"": ("age", "bmi", "ill")}
    both = fb.FederatedData.stack([{"a": GOOD[["bmi"]], "b": GOOD["ill"]}], [{"a": GOOD[["bmi"]], "b": GOOD["ill"]}])
    assert both.columns("inner") == {"['a']": ("bmi",)} and both.inner.rows["b"].shape == (4,)
    assert fb.FederatedData.stack([GOOD.to_numpy()], [GOOD.to_numpy()]).columns("inner") == {}


APART = {
    "swapped": (SWAPPED, r"east has column 'bmi' in place 0, where north has 'age'"),
    "renamed": (GOOD.rename(columns={"bmi": "BMI"}), "east has a column 'BMI' where north has 'bmi'"),
    "missing": (GOOD.drop(columns="bmi"), "east lacks a column 'bmi' that north has"),
    "one more": (but(sex=[0, 1, 1, 0]), "east has a column 'sex' that north lacks"),
    "no names": (GOOD.to_numpy(), "east has no names of columns where north has 'age'"),
    "another type": (GOOD.astype("float32"), "east has other .* column 'age'.*: float32 against float64"),
}


@pytest.mark.parametrize("what", APART)
@pytest.mark.parametrize(
    "under", [lambda t: (t,), lambda t: {"x": t, "y": np.ones(len(t))}], ids=["alone", "in a dict"]
)
def test_clients_whose_columns_differ_are_refused(what, under):
    other, sentence = APART[what]
    for attempt in calls(other, under):
        refused(attempt, sentence, "(in its )?(inner|outer) (rows|data)")


def test_levels_whose_columns_differ_are_refused():
    rows = {"north": (GOOD,), "east": (GOOD,)}
    for other, word in ((SWAPPED, "'bmi' in place 0"), (GOOD.rename(columns={"ill": "well"}), "'well' where .* 'ill'")):
        refused(lambda o=other: fb.FederatedData.stack(rows, {"north": (o,), "east": (o,)}), "north: its outer", word)
    plain = (SWAPPED.to_numpy(),)
    assert fb.FederatedData.stack(rows, {"north": plain, "east": plain}).clients == 2  # meant to differ
    refused(lambda: fb.FederatedData.stack(rows, {"north": plain, "east": (SWAPPED,)}), "no names of columns")


VALUES = {
    "NaN": (but(bmi=[1.0, np.nan, 2.0, 3.0]), "NaN .*column 'bmi'.*row 1"),
    "infinite": (but(bmi=[1.0, 2.0, -np.inf, 3.0]), "infinite .*column 'bmi'.*row 2.*-inf"),
    "NA": (but(ill=pd.array([0, None, 1, 1], "Int64")), "missing values .*row 1.*column 'ill'"),
    "missing truth": (but(ill=pd.array([True, None, True, True], "boolean")), "missing values .*column 'ill'"),
    "missing float": (but(age=pd.array([1.0, None, 1.0, 1.0], "Float64")), "(missing|NaN) .*column 'age'"),
    "text": (but(sex=["f", "m", "m", "f"]), "text.*column 'sex'.*'f'.*encode"),
    "categories": (but(sex=pd.Categorical(["f", "m", "m", "f"])), "categories.*column 'sex'.*'f'.*cat.codes"),
    "dates": (but(day=pd.date_range("2024-01-01", periods=4)), "dates.*column 'day'.*2024"),
    "dates of a zone": (but(day=pd.date_range("2024-01-01", periods=4, tz="UTC")), "dates.*column 'day'"),
    "durations": (but(stay=pd.to_timedelta([1, 2, 3, 4], "D")), "dates or times.*column 'stay'"),
    "periods": (but(year=pd.period_range("2020", periods=4, freq="Y")), "text or objects.*column 'year'"),
    "objects": (but(age=np.array([61, None, 55, 70], object)), "objects.*column 'age'.*None"),
    "arrays in cells": (but(scan=[np.ones(3)] * 4), "objects.*column 'scan'"),
    "two of a name": (GOOD.set_axis(["age", "age", "ill"], axis=1), "2 columns named 'age'"),
    "no columns": (GOOD[[]], "a table without columns"),
}


@pytest.mark.parametrize("what", VALUES)
def test_the_column_is_named_in_messages_about_values(what):
    other, sentence = VALUES[what]
    for attempt in calls(other):
        refused(attempt, "^east has", sentence)
    refused(calls(other, lambda t: {"x": t})[0], sentence, r"\['x'\]")


@pytest.mark.parametrize("what", ["too long", "infinite", "small", "equal"])
def test_the_column_is_named_when_values_are_narrowed(what):
    with jax.enable_x64(False):
        if what == "too long":
            north = GOOD[["ill"]].assign(id=1)
            other = north.assign(id=[1, 2, 5_000_000_001, 3])
            rows = {"north": (north,), "east": (other,)}
            refused(
                lambda: fb.FederatedData.split(rows, 0.5, KEY), "east has 5000000001.*column 'id'.*, row 2", "int32"
            )
        elif what == "infinite":
            refused(calls(but(age=[1, 2, 3, 1e39]))[0], "east has 1e[+]39.*column 'age'.*, row 3", "float32")
        else:
            column = {"small": [1.0, 1e-60, 2, 3], "equal": [1.7e9, 1.7e9 + 1, 2, 3]}[what]
            for attempt in calls(but(age=column)):
                match = "east has (1e-60|1700000000 and 1700000001) in its .*column 'age'"
                with pytest.warns(fb.errors.FedbilevelWarning, match=match) as seen:
                    attempt()
                assert len(seen) == 1


def test_long_integers_beside_floats_become_equal_in_64_bits_too():
    ids = pd.DataFrame({"id": [2**53 + 1, 2**53], "x": [0.5, 0.5]})
    with pytest.warns(fb.errors.FedbilevelWarning, match="9007199254740992 and 9007199254740993.*column 'id'"):
        fb.FederatedData.stack([ids], [ids])
    with warnings.catch_warnings(action="error"):
        fb.FederatedData.stack([ids[["id"]]], [ids[["id"]]])


def test_other_columns_have_the_right_values():
    table = pd.DataFrame({
        "b": [True, False], "i": pd.array([3, 4], "Int64"), "f": pd.array([0.5, 1.5], "Float32"),
        "c": pd.Categorical([7, 9]), "s": pd.arrays.SparseArray([0.0, 2.0]), "t": pd.array([True, True], "boolean"),
        "u": np.array([1, 2], "uint8"),
    }, index=["p", "q"])  # fmt: skip
    rows = np.asarray(fb.FederatedData.stack([table], [table]).inner.rows)
    assert rows.tolist() == [[1, 3, 0.5, 7, 0, 1, 1], [0, 4, 1.5, 9, 2, 1, 2]]
    assert rows.dtype == np.float64
    for column, kind in (("i", np.int64), ("b", np.bool_), ("f", np.float32)):
        one = fb.FederatedData.stack([table[[column]]], [table[column]])
        assert one.inner.rows.dtype == one.outer.rows.dtype == kind
        assert one.inner.rows.shape == (2, 1) and one.outer.rows.shape == (2,)
    numbered = pd.DataFrame(np.eye(3))
    assert fb.FederatedData.stack([numbered], [numbered]).columns("inner") == {"": ("0", "1", "2")}


def test_a_series_is_named_by_its_key_or_itself():
    x, y = GOOD[["age"]], GOOD["ill"]
    named = {"north": {"x": x, "y": y}, "east": {"x": x, "y": y.rename("sick")}}
    assert fb.FederatedData.split(named, 0.5, KEY).clients == 2
    refused(
        lambda: fb.FederatedData.split({"n": (x, y), "e": (x, y.rename("sick"))}, 0.5, KEY), "e has a column 'sick'"
    )
    bad = y.astype(float).replace(1.0, np.nan)
    refused(lambda: fb.FederatedData.split({"n": (x, bad)}, 0.5, KEY), r"n has NaN .*column 'ill' of \[1\], row 1")


def test_a_table_is_not_a_list_of_clients():
    refused(lambda: fb.FederatedData.split(GOOD, 0.5, KEY), "clients= is a DataFrame")
    refused(lambda: fb.FederatedData.split(dict(GOOD.items()), 0.5, KEY), "ONE data set")
    named = fb.FederatedData.split(dict(list(GOOD.drop(columns="bmi").groupby("ill"))), 0.5, KEY)
    assert named.names == ("client 0", "client 1")


# What a site tells of its tables --------------------------------------------------------------------------------------


def test_sites_compare_the_names_of_columns():
    mine = schema({"x": GOOD, "y": GOOD["ill"]})
    assert mine == schema({"x": GOOD.iloc[:2], "y": GOOD["ill"]})
    for other, sentence in APART.values():
        theirs = schema({"x": other, "y": GOOD["ill"]})
        said = apart(theirs, mine)
        assert theirs != mine and ("float32" in said or re.search("'(bmi|BMI|sex|age)'", said)), (sentence, said)
    zeros = placeholder(mine)
    assert zeros["x"].shape == (1, 3) and zeros["x"].dtype == np.float64 and zeros["y"].dtype == np.int64
    assert placeholder(schema((GOOD["age"],)))[0].shape == (1,)


APP = """
    import jax.numpy as jnp
    import numpy as np
    import pandas as pd
    import fedbilevel as fb

    def inner(x, y, e):
        return 0.5 * (e[:2] @ y - e[2]) ** 2 + 0.5 * jnp.sum(jnp.exp(x) * y**2)

    def outer(x, y, e):
        return 0.5 * (e[:2] @ y - e[2]) ** 2

    def load(site):
        draw = np.random.default_rng(int(site.split("-")[1]))
        inner, outer = (pd.DataFrame(draw.normal(size=(6, 3)), columns=["age", "bmi", "out"]) for _ in range(2))
        if site == "site-2":
            SPOILT
        return inner, outer

    app = fb.App(
        name="tables", problem=fb.Problem(inner, outer), start=lambda: (jnp.zeros(2), jnp.zeros(2)), load=load, ALGORITHM
    )
"""
SPOILT = {
    "nothing": ("pass", ""),
    "swapped": (
        "inner, outer = inner[['bmi', 'age', 'out']], outer[['bmi', 'age', 'out']]",
        "site-2 has column 'bmi' in place 0, where site-1 has 'age'",
    ),
    "one level": ("outer = outer[['bmi', 'age', 'out']]", "site-2.* 'bmi' in place 0, where .* 'age'"),
    "renamed": ("inner = inner.rename(columns={'bmi': 'BMI'})", "site-2.* '(BMI|bmi)' where .* '(bmi|BMI)'"),
    "too large": ("inner.loc[4, 'bmi'] = 1e300", r"site-2 has 1e\+300, .*inner rows, column 'bmi', row 4"),
    "missing": ("outer.loc[3, 'out'] = np.nan", "site-2 has NaN .*outer rows, column 'out', row 3"),
    "text": ("inner['age'] = 'old'", "site-2 has text .*inner rows, column 'age'.*'old'"),
    "small": ("outer.loc[1, 'age'] = 1e-90", "site-2 has 1e-90 in its outer rows, column 'age', row 1"),
}


def app_file(tmp_path, what):
    return apps.write(tmp_path, APP.replace("SPOILT", SPOILT[what][0]), f"iterations=2, {apps.LOCKSTEP}")


@pytest.mark.parametrize("what", SPOILT)
def test_in_apps_the_site_and_the_column_are_named(tmp_path, what):
    app = load_app(app_file(tmp_path, what))
    with jax.enable_x64(False), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if what in ("nothing", "small"):
            assert app.data(SITES).names == tuple(SITES)
        else:
            refused(lambda: app.data(SITES), SPOILT[what][1])
    told = "".join(str(one.message) for one in warned)
    assert re.search(SPOILT[what][1], told) if what == "small" else not warned


@pytest.mark.parametrize("what", SPOILT)
def test_sites_of_the_network_name_themselves_and_the_column(tmp_path, what):
    pytest.importorskip("nvflare")
    from fedbilevel.engines.nvflare.agreement import check_rows, derive, fingerprint, placeholder_data
    from fedbilevel.engines.nvflare.worker import _Inside

    file, wide = app_file(tmp_path, what), jax.config.read("jax_enable_x64")
    try:  # in this process, a site after the other; loading an app sets its precision
        sites = {name: _Inside(str(file), name, tmp_path / name) for name in SITES}

        def agree():
            loaded = {name: site.do("load", b"", {})[0] for name, site in sites.items()}
            said = {name: answer["rows"] for name, answer in loaded.items()}
            for name, rows in said.items():
                check_rows(name, rows, SITES[0], said[SITES[0]])
            protocol = fingerprint(derive(sites[SITES[0]].app, placeholder_data(said[SITES[0]], 3, None), 3))
            setup = {"sites": 3, "cohort": 3, "seed": 0, "scale": None, "protocol": protocol, "resume": False}
            for i, site in enumerate(sites.values()):
                site.do("prepare", b"", {"index": i, **setup})
            return [answer.get("warnings") for answer in loaded.values()]

        if what in ("nothing", "small"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                told = agree()
            assert told[0] is told[2] is None
            assert re.search(SPOILT[what][1], "".join(told[1] or []))
        else:
            refused(agree, SPOILT[what][1])
    finally:
        jax.config.update("jax_enable_x64", wide)


@pytest.mark.network
def test_over_the_network_the_site_and_the_column_are_named(tmp_path):
    for what in ("swapped", "too large"):
        folder = tmp_path / what.replace(" ", "-")  # nvflare's simulator does not take a space in a path
        folder.mkdir()
        told = call("run", app_file(folder, what), "--engine", "nvflare", "--out", folder / "out", code=2)
        assert re.search(SPOILT[what][1], told), told
    (tmp_path / "small").mkdir()
    told = call("run", app_file(tmp_path / "small", "small"), "--engine", "nvflare", "--out", tmp_path / "out")
    assert re.search(SPOILT["small"][1], told), told
