"""Rows become what JAX holds with the right values, or a sentence names the client, the place and the value."""

from __future__ import annotations

import time
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.rows import alike, one

KEY = jax.random.key(0)
NAMES = ["north", "south"]
GOOD = np.arange(12.0).reshape(6, 2)


@pytest.fixture
def narrow():
    """As users have it: 32 bits."""
    with jax.enable_x64(False):
        yield


def stack(rows, good=GOOD, level="inner", key=None):
    """Two clients, of which south has `rows` at one level (under a key, if one is given)."""
    own = (good, rows) if key is None else ({key: good}, {key: rows})
    both = {"inner": list(own), "outer": [own[0], own[0]]}
    both = both if level == "inner" else {"inner": both["outer"], "outer": both["inner"]}
    return fb.FederatedData.stack(**both, names=NAMES)


def split(rows, good=GOOD):
    return fb.FederatedData.split([good, rows], 0.5, KEY, names=NAMES)


def changed(value, dtype=None, at=(3, 1)):
    """GOOD in a dtype, with one value changed."""
    rows = GOOD.astype(dtype or np.asarray(value).dtype)
    rows[at] = value
    return rows


def refused(call, *words):
    with pytest.raises(fb.InputError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    assert not [word for word in words if word not in text], text
    return text


# Values that do not survive -------------------------------------------------------------------------------------------

LOST = {
    "int64 above": (np.int64(5_000_000_001), "5000000001", "int32"),
    "int64 below": (np.int64(-(2**31) - 1), "-2147483649", "int32"),
    "uint64": (np.uint64(2**32), "4294967296", "uint32"),
    "float64": (np.float64(1e300), "1e+300", "float32"),
    "negative float64": (np.float64(-3.5e38), "-3.5e+38", "float32"),
    "complex": (np.complex128(1 + 1e200j), "1e+200j", "complex64"),
    "longdouble": (np.longdouble("1e39"), "1e+39", "float32"),
    "big-endian": (np.array(2**31, ">i8"), "2147483648", "int32"),
}


@pytest.mark.parametrize("what", LOST)
@pytest.mark.parametrize("level", ["inner", "outer"])
def test_what_does_not_survive_in_32_bits_is_refused(narrow, what, level):
    value, shown, target = LOST[what]
    rows = changed(value, value.dtype)
    good = GOOD.astype(value.dtype)
    refused(lambda: stack(rows, good, level, "a"), "south", level, "['a']", "column 1", "row 3", shown, target)
    refused(lambda: split(rows, good), "south", "column 1", "row 3", shown)


@pytest.mark.parametrize("what", LOST)
def test_with_64_bits_nothing_is_narrowed(what):
    value = LOST[what][0]
    data = stack(changed(value, value.dtype), GOOD.astype(value.dtype))
    assert data.inner.rows[9, 1] == value.astype(value.dtype.newbyteorder("=")).astype(data.inner.rows.dtype)


def test_a_longdouble_beyond_64_bits_is_refused_there_too():
    value = np.longdouble("1e400")
    refused(lambda: stack(changed(value), GOOD.astype(np.longdouble)), "south", "1e+400", "float64")


def test_the_first_value_of_the_first_client_is_named(narrow):
    rows = changed(1e200, at=(1, 0))
    rows[4, 1] = 1e100
    refused(lambda: stack(rows), "south", "1e+200", "row 1", "column 0")


def test_integers_at_the_ends_of_32_bits_survive(narrow):
    ends = np.array([[2**31 - 1, -(2**31)]] * 6)
    assert (np.asarray(stack(ends, ends).inner.rows) == np.concatenate([ends, ends])).all()


DOUBTS = {
    "a small float": (changed(1e-50), "1e-50", "0.0"),
    "below the normal numbers": (changed(-1e-40), "-1e-40", "0.0"),
    "time stamps": (np.array([[1_700_000_000.0, 0.5], [1_700_000_001.0, 0.5]] * 3), "1700000000", "1700000001"),
    "odd ids": (GOOD // 2 + [[16_777_216.0, 0.5]], "16777216", "16777217"),
    "a part of a complex number": (changed(1 + 1e-60j), "1e-60j", "0.0"),
}


@pytest.mark.parametrize("what", DOUBTS)
def test_what_becomes_zero_or_equal_is_one_warning(narrow, what):
    rows, *values = DOUBTS[what]
    good = GOOD.astype(rows.dtype)
    for call in (lambda: stack(rows, good, key="a"), lambda: stack(rows, good, "outer", key="a")):
        with pytest.warns(fb.errors.FedbilevelWarning) as seen:
            call()
        text = str(seen[0].message)
        assert len(seen) == 1 and all(word in text for word in ("south", "column", "['a']", *values)), text
    assert __file__ == seen[0].filename
    with jax.enable_x64(True), warnings.catch_warnings(action="error"):
        stack(rows, good)


def test_values_that_become_equal_are_found_across_clients_and_levels(narrow):
    ids = lambda *values: np.array(values, float)
    with pytest.warns(
        fb.errors.FedbilevelWarning, match="north has 16777216, and south has 16777217 in its inner rows"
    ):
        fb.FederatedData.stack([ids(16777216), ids(16777217)], [ids(1), ids(2)], names=NAMES)
    with pytest.warns(fb.errors.FedbilevelWarning, match="16777216.*16777217"):
        fb.FederatedData.split([ids(16777216, 16777217)], 0.5, KEY)
    with pytest.warns(fb.errors.FedbilevelWarning, match="south has 33554432 and 33554433"):  # north's are no integers
        fb.FederatedData.stack([ids(0.5, 1), ids(33554432, 33554433)], [ids(1), ids(2)], names=NAMES)


@pytest.mark.parametrize("seed", range(3))
def test_ordinary_rounding_is_silent(narrow, seed):
    draw = np.random.default_rng(seed)
    rows = [np.concatenate([draw.normal(size=(50, 3)), 1e9 * draw.normal(size=(50, 1))], 1) for _ in range(2)]
    rows[0][0] = 0.0
    ids = np.arange(2**24 - 25.0, 2**24 + 1)
    with warnings.catch_warnings(action="error"):
        data = fb.FederatedData.stack(rows, rows)
        fb.FederatedData.stack([ids], [ids])
        fb.FederatedData.stack([ids * 2**60], [np.repeat(ids, 2)])
    assert (np.asarray(data.inner.rows) == np.concatenate(rows).astype(np.float32)).all()


# Kinds of arrays ------------------------------------------------------------------------------------------------------

KINDS = {
    "masked": (np.ma.masked_array(GOOD, GOOD == 3), "masked values", ".filled("),
    "structured": (np.array([(1, 2.0)] * 6, [("a", "i4"), ("b", "f4")]), "structured", "rows.dtype.names"),
    "record": (np.rec.fromarrays([GOOD[:, 0], GOOD[:, 1]], names="a,b"), "structured", "dict"),
    "raw bytes": (np.zeros(6, "V8"), "structured", "dict"),
    "datetime": (np.arange("2020-01", "2020-07", dtype="M8[M]"), "dates or times", "2020, 1, 1"),
    "timedelta": (np.arange(6).astype("m8[s]"), "dates or times", "days"),
    "objects": (np.array([1.5, None] * 3), "Python objects", "None", "encode"),
    "huge integers": (np.array([2**70] * 6), "Python objects", "1180591620717411303424"),
    "text": (np.array(list("abcdef")), "text", "'a'", "encode"),
    "bytes": (np.array([b"a"] * 6), "text", "b'a'"),
    "NaN": (changed(np.nan), "NaN or infinite", "column 1", "row 3", "nan"),
    "infinity": (changed(-np.inf), "NaN or infinite", "-inf"),
    "NaN in half precision": (changed(np.nan, jnp.bfloat16), "NaN or infinite", "row 3"),
    "keys": (jax.random.split(KEY, 6), "jax.random keys", "key_data"),
    "a number": (3.5, "3.5 where there should be an array"),
    "an object": (types.SimpleNamespace(), "a SimpleNamespace"),
    "a mapping proxy": (types.MappingProxyType({"a": GOOD}), "a mappingproxy", "dict(rows)"),
    "nothing": ({}, "no arrays"),
}


@pytest.mark.parametrize("what", KINDS)
def test_what_is_no_array_of_numbers_is_refused(what):
    rows, *words = KINDS[what]
    good = GOOD.astype(rows.dtype) if "NaN" in what else GOOD
    refused(lambda: fb.FederatedData.stack([rows, good], [good, good], names=NAMES), "north", *words)
    refused(lambda: fb.FederatedData.split([rows, good], 0.5, KEY, names=NAMES), "north", *words)


def test_other_arrays_have_the_right_values(narrow):
    wide = [GOOD.astype(kind) for kind in (">f8", "<f8", np.longdouble)]
    for rows in (*wide, np.ma.masked_array(GOOD), jnp.asarray(GOOD)):
        data = fb.FederatedData.stack([rows], [rows])
        assert data.inner.rows.dtype == jnp.float32 and (np.asarray(data.inner.rows) == GOOD).all()
    big = np.arange(6, dtype=">i2")
    assert np.asarray(fb.FederatedData.stack([big], [big]).outer.rows).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, np.float16, jnp.int4, jnp.uint4, jnp.float8_e4m3fn, jnp.float8_e5m2, np.int8, np.bool_]
)
def test_narrow_types_stay_as_they_are(dtype):
    rows = (GOOD % 2).astype(dtype)
    for own in (rows, jnp.asarray(rows)):
        data = fb.FederatedData.split([own], 0.5, KEY)
        assert data.inner.rows.dtype == dtype
        assert sorted(np.concatenate([data.inner.rows, data.outer.rows]).astype(float)[:, 1]) == [1.0] * 6


class Foreign:
    """A type of another library, known by its module."""

    ndim, shape = 2, (6, 2)

    def __array__(self, *_, **__):
        return GOOD


OTHERS = {
    "torch": ".detach().cpu().numpy()", "torch.nn.parameter": ".numpy()", "polars.dataframe.frame": ".to_pandas()",
    "tensorflow.python.framework.ops": ".numpy()", "xarray.core.dataarray": ".values", "scipy.sparse._csr": ".toarray()",
}  # fmt: skip


@pytest.mark.parametrize("module", OTHERS)
def test_arrays_of_other_libraries_name_the_conversion(module):
    kind = type("Tensor", (Foreign,), {"__module__": module})
    library = module.partition(".")[0]
    refused(lambda: stack(kind(), key="a"), "south", "['a']", library, "Tensor", OTHERS[module])
    refused(lambda: fb.FederatedData.stack(kind(), kind()), "Tensor", OTHERS[module])
    own = type("Tensor", (Foreign,), {"__module__": "torchless"})()
    assert stack(own).clients == 2  # any other that knows how to become an array


def test_a_sparse_matrix_is_refused():
    sparse = pytest.importorskip("scipy.sparse")
    refused(lambda: stack(sparse.csr_matrix(GOOD)), "south", "scipy csr_matrix", ".toarray()")
    refused(lambda: stack(sparse.coo_array(GOOD)), "south", "scipy coo_array", ".toarray()")


LISTS = {
    "numbers": [0.5] * 200_000,
    "rows": [[0.5, 1.0]] * 200_000,
    "a tuple of numbers": (1, 2, 3),
    "arrays": list(np.ones((5_000, 3))),
    "text": ["a", "b"],
    "in a dict": {"a": [[1, 2], [3, 4]]},
    "columns": ([[1.0, 2.0]] * 100_000, [1] * 100_000),
}


@pytest.mark.parametrize("what", LISTS)
def test_lists_are_refused_in_a_short_sentence_and_at_once(what):
    begin = time.process_time()
    refused(lambda: fb.FederatedData.stack([LISTS[what]], [GOOD], names=["north"]), "north", "numpy.asarray(rows)")
    refused(lambda: fb.FederatedData.split({"north": (LISTS[what],)}, 0.5, KEY), "north", "numpy.asarray(rows)")
    assert time.process_time() - begin < 1.0


def test_what_has_thousands_of_arrays_is_described_in_short():
    many = {f"a{i}": np.ones(3) for i in range(3_000)}
    refused(lambda: fb.FederatedData.stack([many, {**many, "b": np.ones(3)}], [GOOD] * 2), "client 1", "3001 arrays")
    refused(lambda: fb.FederatedData.stack([{**many, "b": np.ones(2)}], [GOOD]), "client 0", "same number of rows")


# Which clients there are ----------------------------------------------------------------------------------------------

ROWS = {"b": {"a": GOOD}, "a": {"a": GOOD + 1}}


def test_a_mapping_is_clients_by_name_in_the_order_of_inner():
    data = fb.FederatedData.stack(ROWS, dict(reversed(ROWS.items())))
    assert data.names == ("b", "a")
    assert (np.asarray(data.outer.alone(1).rows["a"]) == GOOD + 1).all()
    assert fb.FederatedData.split(ROWS, 0.5, KEY).names == ("b", "a")
    assert fb.FederatedData.split({3: (GOOD,)}, 0.5, KEY).names == ("client 3",)
    assert fb.FederatedData.split([GOOD], 0.5, KEY).names == ("client 0",)


def test_names_do_not_change_the_numbers():
    one, other = (fb.FederatedData.split(rows, 0.5, KEY) for rows in (ROWS, list(ROWS.values())))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (np.asarray(a) == np.asarray(b)).all()
    assert jax.tree.structure(one) == jax.tree.structure(other)  # nor are they another program's


CLIENTS = {
    "bare arrays": (
        lambda: fb.FederatedData.split({"a": GOOD, "b": GOOD}, 0.5, KEY),
        "ONE data set",
        "names=list(rows)",
    ),
    "bare arrays in stack": (lambda: fb.FederatedData.stack({"a": GOOD}, {"a": GOOD}), "ONE data set", "'a'"),
    "a list in a mapping": (lambda: fb.FederatedData.split({"a": [GOOD]}, 0.5, KEY), "ONE data set"),
    "one by name": (lambda: fb.FederatedData.stack(ROWS, list(ROWS.values())), "inner= has clients by name"),
    "the other by name": (lambda: fb.FederatedData.stack(list(ROWS.values()), ROWS), "outer= has clients by name"),
    "one more": (lambda: fb.FederatedData.stack(ROWS, {"b": ROWS["b"]}), "outer= has no rows of 'a'"),
    "another": (lambda: fb.FederatedData.stack({"b": ROWS["b"]}, ROWS), "inner= has no rows of 'a'"),
    "nobody": (lambda: fb.FederatedData.split({}, 0.5, KEY), "no clients"),
    "names and keys": (lambda: fb.FederatedData.stack(ROWS, ROWS, names=NAMES), "the mapping's keys"),
    "too few names": (lambda: fb.FederatedData.stack([GOOD] * 3, [GOOD] * 3, names=NAMES), "each of the 3", "got 2"),
    "too many names": (lambda: fb.FederatedData.split([GOOD], 0.5, KEY, names=NAMES), "each of the 1", "got 2"),
    "a word": (lambda: fb.FederatedData.stack([GOOD] * 2, [GOOD] * 2, names="ab"), "'ab'"),
    "twice": (lambda: fb.FederatedData.stack([GOOD] * 2, [GOOD] * 2, names=["a", "a"]), "two clients", "'a'"),
    "no text": (lambda: fb.FederatedData.stack([GOOD], [GOOD], names=[None]), "names= is a list", "None"),
    "a set": (lambda: fb.FederatedData.stack([GOOD] * 2, [GOOD] * 2, names={"a", "b"}), "names= is a list"),
    "pairs": (lambda: fb.FederatedData.split([("a", GOOD), ("b", GOOD)], 0.5, KEY), "a mapping, dict(clients)"),
    "no name": (lambda: fb.FederatedData.stack([GOOD], [GOOD], names=[""]), "empty"),
    "a flat array": (lambda: fb.FederatedData.stack(np.ones(4), np.ones(4)), "shape (4,)"),
    "a number": (lambda: fb.FederatedData.stack(3, 4), "inner= is 3"),
    "nothing": (lambda: fb.FederatedData.split(None, 0.5, KEY), "clients= is None"),
    "a share in words": (lambda: fb.FederatedData.split([GOOD], "half", KEY), "between 0 and 1; got half"),
    "a number for a key": (lambda: fb.FederatedData.split([GOOD], 0.5, 0), "key= is a jax.random.key"),
    "keys": (lambda: fb.FederatedData.split([GOOD], 0.5, jax.random.split(KEY)), "key= is a jax.random.key"),
}


@pytest.mark.parametrize("what", CLIENTS)
def test_clients_that_cannot_be_told_are_refused(what):
    call, *words = CLIENTS[what]
    refused(call, *words)


def test_names_are_in_every_message():
    nan, none = changed(np.nan), GOOD[:0]
    for bad, word in (
        (nan, "NaN"),
        (none, "no inner rows"),
        (GOOD[:, :1], "other inner data"),
        (GOOD > 1, "bool[6,2]"),
    ):
        refused(lambda rows=bad: fb.FederatedData.stack({"x": (GOOD,), "east": (rows,)}, {"x": (GOOD,), "east": (GOOD,)}),
                "east", word)  # fmt: skip
    refused(lambda: fb.FederatedData.split({"east": {"a": GOOD[:1]}}, 0.5, KEY), "east has 1 rows")


def test_weights_go_by_name_too():
    data = fb.FederatedData.stack(ROWS, ROWS, weights={"a": 3, "b": 1})
    assert np.asarray(data.weights).tolist() == [0.25, 0.75]
    weigh = lambda weights: lambda: fb.FederatedData.stack(ROWS, ROWS, weights=weights)
    refused(weigh({"a": 3}), "weights= by name", "'b'")
    refused(weigh([1, -2]), "a has -2.0")
    refused(weigh(["much", "more"]), "one number per client")
    refused(weigh([1, 1e-320]), "the weight of a is")
    with jax.enable_x64(False):
        refused(weigh([1e-60, 1]), "the weight of b is 1e-60")


def test_rows_without_columns_pass(narrow):
    for dtype in (np.float64, np.int64):
        nothing = np.ones((3, 0), dtype)
        assert fb.FederatedData.stack([nothing], [nothing]).inner.rows.shape == (3, 0)


def test_an_array_whose_first_axis_is_the_clients():
    for kind in (np.asarray, jnp.asarray):
        data = fb.FederatedData.stack(kind(np.stack([GOOD, GOOD + 1])), np.ones((2, 4)), names=np.array(NAMES))
        assert data.names == tuple(NAMES) and data.count("outer").tolist() == [4, 4]
        assert (np.asarray(data.inner.alone(1).rows) == GOOD + 1).all()
    assert fb.FederatedData.stack((GOOD for _ in range(3)), [GOOD] * 3).clients == 3


def test_a_raw_key_means_the_same_as_a_new_one():
    one, other = (fb.FederatedData.split([GOOD], 0.5, make(7)) for make in (jax.random.key, jax.random.PRNGKey))
    assert (np.asarray(one.inner.rows) == np.asarray(other.inner.rows)).all()


def test_a_client_that_fails_is_named():
    def loss(x, y, e):
        return jnp.sum(e["a"]) * x * y**2

    class Failing(fb.Algorithm):
        def step(self, fed, state):
            return fb.State(state.x, fed.average(self.same, state.y)), {}

        def same(self, client, y):
            jax.debug.callback(lambda i: (_ for _ in ()).throw(OSError("no disk")) if i == 1 else None, client.index)
            return y

    data = fb.FederatedData.split(ROWS, 0.5, KEY)
    with pytest.raises(fb.RunError, match=r"a failed in Failing\.same.*no disk"):
        fb.solve(fb.Problem(loss, loss), data, Failing(), 1.0, 1.0, 1, key=KEY, engine=fb.Loopback(jit=False))


def test_rows_that_are_right_are_described_to_nobody(monkeypatch):
    """With descriptions, which are for sentences alone, a client took a millisecond."""

    def describe(tree):
        raise AssertionError(f"described: {tree}")

    for module in (one, alike):
        monkeypatch.setattr(module, "describe", describe)
    rows = [{"a": GOOD, "b": GOOD[:, 0]} for _ in range(3)]
    fb.FederatedData.stack(rows, rows)
