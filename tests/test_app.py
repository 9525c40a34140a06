"""Applications: read, simulated, refused with a sentence; what a site tells of its rows is their shape."""

from __future__ import annotations

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedbilevel as fb
from fedbilevel.app import load_app, placeholder, schema
from fedbilevel.engines.nvflare.agreement import derive, fingerprint, placeholder_data, shares
from helpers import apps, tabled
from helpers.checks import unchecked
from helpers.network import close

SITES = ["site-1", "site-2", "site-3"]


@pytest.fixture
def file(tmp_path):
    return apps.write(tmp_path, apps.CLOSED_FORM, f"iterations=6, {apps.LOCKSTEP}")


@pytest.mark.parametrize("engine", ["simulation", "loopback"])
def test_an_app_is_simulated_from_the_command_line(fedbilevel, file, tmp_path, engine):
    out = tmp_path / engine
    code, printed, errors = fedbilevel("run", file, "--engine", engine, "--out", out, "--json")
    assert code == 0, errors
    assert json.loads(printed)["iteration"] == 6
    app = load_app(file)
    x, y = app.begin()
    expected = fb.solve(app.problem, app.data(SITES), app.algorithm, x, y, 6, key=app.key)
    with np.load(out / "variables.npz") as kept:
        np.testing.assert_allclose(kept["x"], expected.x, rtol=0, atol=1e-13)
        np.testing.assert_allclose(kept["y"], expected.y, rtol=0, atol=1e-13)


def test_it_goes_on_where_it_stopped(fedbilevel, file, tmp_path):
    for words in (("--iterations", 3), ("--resume",)):
        code, _, errors = fedbilevel("run", file, "--out", tmp_path / "out", *words)
        assert code == 0, errors
    whole = tmp_path / "whole"
    fedbilevel("run", file, "--out", whole)
    for name in "xy":
        one, other = (np.load(place / "variables.npz")[name] for place in (tmp_path / "out", whole))
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--model", "cnn"), "--model is for tasks"),
        (("--dataset", "mnist"), "--dataset is for tasks"),
        (("--precision", 32), "--precision is for tasks"),
        (("--algorithm", "agitd"), "did you mean 'aggitd'"),
        (("--set", "inner_rounds=1"), "there is no setting of lockstep 'inner_rounds'"),
        (("--algorithm", "aggitd", "--engine", "nvflare"), "--algorithm and --set are for simulation"),
        (("--set", "inner_lr=1", "--engine", "nvflare"), "--algorithm and --set are for simulation"),
        (("--engine", "warp"), "there is no engine 'warp'"),
        (("--poc",), "--poc goes with --engine nvflare"),
        (("--clients", 0), "--clients is how many sites there are"),
        (("--resume",), "nothing to resume"),
        (("--cohort", 7), "a cohort of 7 cannot be drawn from 3"),
    ],
)
def test_what_an_app_cannot_be_asked(fedbilevel, file, tmp_path, words, sentence):
    code, _, errors = fedbilevel("run", file, "--out", tmp_path / "out", *words)
    assert code == 2 and sentence in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x = 1", "must define app"),
        ("app = 3", "its app is 3"),
        ("1 / 0", "ZeroDivisionError"),
        ("import fedbilevel as fb\napp = fb.App(None, None, None, None)", "App(problem=...)"),
    ],
)
def test_a_file_that_is_no_app(fedbilevel, tmp_path, text, sentence):
    (tmp_path / "app.py").write_text(text)
    with unchecked():  # what the file makes its app of
        code, _, errors = fedbilevel("run", tmp_path / "app.py", "--out", tmp_path / "out")
    assert code == 2 and sentence in errors and len(errors.splitlines()) == 1


def test_there_is_no_such_file(fedbilevel, tmp_path):
    code, _, errors = fedbilevel("run", tmp_path / "none.py")
    assert code == 2 and "there is no file" in errors


def test_a_loader_that_fails_is_named(fedbilevel, tmp_path):
    text = apps.CLOSED_FORM.replace("k = int", "raise OSError('disk on fire')\n        k = int")
    file = apps.write(tmp_path, text, f"iterations=6, {apps.LOCKSTEP}")
    code, _, errors = fedbilevel("run", file, "--out", tmp_path / "out")
    assert code == 2 and "load('site-1') of the app failed: OSError: disk on fire" in errors


# What a site tells -------------------------------------------------------------------------------------------------------

arrays = st.builds(
    lambda shape, dtype: np.zeros((2, *shape), dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(["float32", "float64", "int32", "bool", jnp.bfloat16]),
)
trees = st.recursive(
    arrays,
    lambda inside: st.one_of(
        st.lists(inside, min_size=1, max_size=3),
        st.lists(inside, min_size=1, max_size=3).map(tuple),
        st.dictionaries(st.text(min_size=1, max_size=4), inside, min_size=1, max_size=3),
    ),
    max_leaves=6,
)


@given(trees)
def test_one_row_of_zeros_has_the_shape_of_the_rows(rows):
    zeros = placeholder(schema(rows))
    assert jax.tree.structure(zeros) == jax.tree.structure(rows)
    for one, other in zip(jax.tree.leaves(zeros), jax.tree.leaves(rows), strict=True):
        assert (one.shape, one.dtype) == ((1, *other.shape[1:]), other.dtype)


words = st.sampled_from(["row", "dict", "list", "tuple", "dtype", "x", "float32", "object"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | words, lambda inside: st.lists(inside) | st.dictionaries(words, inside)
)


@given(st.text() | anything.map(json.dumps))
def test_a_schema_that_makes_no_sense_is_refused(text):
    with contextlib.suppress(fb.InputError):
        placeholder(text)


@pytest.mark.parametrize("dtype", ["object", "O", "|O8"])
def test_objects_and_giants_are_refused(dtype):
    with pytest.raises(fb.InputError):
        placeholder(json.dumps({"row": [2], "dtype": dtype}))
    with pytest.raises(fb.InputError):
        placeholder(json.dumps({"row": [2**40, 2**40], "dtype": "float32"}))


def test_rows_in_other_containers_are_refused():
    with pytest.raises(fb.InputError, match="dicts, lists and tuples of arrays"):
        schema({"a": "not rows"})


def test_sites_and_server_derive_the_same_protocol(file):
    app = load_app(file)
    schemas = [schema(level) for level in app.rows("site-1")]
    derived = [fingerprint(derive(app, placeholder_data(schemas, 3, None), 3)) for _ in range(2)]
    x, y = app.begin()
    real = fb.protocol(app.algorithm, app.problem, app.data(SITES), x, y)
    assert derived == [fingerprint(real)] * 2
    assert fingerprint(derive(app, placeholder_data(schemas, 3, None), 2)) != derived[0]


def test_weights_by_rows_are_those_of_a_federation():
    counts = [[3, 2], [5, 7], [1, 1]]
    rows = [[np.ones((n, 2)) for n in pair] for pair in counts]
    data = fb.FederatedData.stack([a for a, _ in rows], [b for _, b in rows], "rows")
    p, scale = shares(counts)
    np.testing.assert_allclose(p, data.weights, atol=1e-15)
    np.testing.assert_allclose(scale, data.outer.scale, atol=1e-15)


# Tables -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tables(tmp_path):
    return apps.write(tmp_path, tabled.text(), "")


def test_tables_of_sites_become_rows_by_what_they_agree_on(fedbilevel, tables, tmp_path):
    app = load_app(tables)
    frames = {site: app.tables(site) for site in SITES}
    rows, prepared = fb.prepare(frames, app.prepare)
    assert prepared.columns[:5] == ("age", "account", "job=boss", "job=clerk", "job=other")
    data = app.data(SITES)
    assert data.prepared == prepared and data.columns("outer") == {"['a']": prepared.columns}
    np.testing.assert_array_equal(data.inner.alone(1).rows["a"], rows["site-2"][0]["a"])
    for engine in ("simulation", "loopback"):
        code, printed, errors = fedbilevel("run", tables, "--out", tmp_path / engine, "--engine", engine)
        assert code == 0, errors
        assert fb.load_prepared(tmp_path / engine) == prepared and "prepared.json" in printed
    close(tmp_path / "simulation", tmp_path / "loopback", 1e-5)
    changed = tables.read_text().replace("default_rng(k), 40", "default_rng(k), 41")
    tables.write_text(changed)
    words = ("run", tables, "--out", tmp_path / "simulation", "--resume", "--iterations", 9)
    code, _, errors = fedbilevel(*words)
    assert code == 2 and "the tables have changed since the run" in errors
    code, _, errors = fedbilevel("run", tables, "--out", tmp_path / "simulation", "--overwrite")
    assert code == 0 and fb.load_prepared(tmp_path / "simulation") != prepared


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("return frame[10:], frame[:10]", "return frame[10:]"), "must return (inner table, outer table)"),
        (("return frame[10:], frame[:10]", "return frame, frame[:0]"), "the outer table of site-1 has no rows"),
        (("return frame[10:], frame[:10]", "return frame.to_numpy(), frame"), "the inner table of site-1 is a ndarray"),
        (('"rooms": draw', 'f"rooms{k}": draw'), "categories= names a column 'rooms', which site-1 does not have"),
        (('categories=["rooms"]', 'categories="rooms"'), "categories= is a list"),
        (("prepare=fb.Prepare(", "prepare=dict("), "App(prepare=...) is a fedbilevel.Prepare"),
    ],
)
def test_tables_that_are_none_are_refused(fedbilevel, tables, tmp_path, change, sentence):
    tables.write_text(tables.read_text().replace(*change))
    with unchecked():
        code, _, errors = fedbilevel("run", tables, "--out", tmp_path / "out")
    assert code == 2 and sentence in errors and len(errors.splitlines()) == 1
