"""A result that was saved comes back as it was, with a template and without; what is cut or other is one sentence."""

from __future__ import annotations

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel import saved
from helpers.quadratic import quadratic

KEY = jax.random.key(0)
Q = quadratic(clients=4, sizes=((3, 3), (5, 4)))
NUMBERS = {"inner_lr": 0.02, "hessian_lr": 0.02, "outer_lr": 0.01}


class Tells(fb.callbacks.Callback):
    """Stops at an iteration."""

    def record(self, run, rows):
        if run.iteration == 3:
            run.stop("enough, of all")


@pytest.fixture(scope="module")
def result():
    return fb.solve(
        Q.problem, Q.data, fb.Lockstep(**NUMBERS), Q.x, Q.y, 5, key=KEY, callbacks=[Tells()], keep="far:max",
        metrics={"far": lambda x, y: fb.testing.distance(x, Q.x), "none": lambda x, y: jnp.nan},
        client_metrics={"square": lambda x, y, row: (y["b"] ** 2).sum()} if isinstance(Q.y, dict) and "b" in Q.y else None,
    )  # fmt: skip


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_all_comes_back(result, tmp_path):
    result.save(tmp_path / "kept")
    back = fb.load_result(tmp_path / "kept", like=(Q.x, Q.y))
    same((back.x, back.y), (result.x, result.y))
    assert back.history.columns == result.history.columns
    assert back.history.stopped == back.stopped == result.stopped == "enough, of all"
    for row, expected in zip(back.history, result.history, strict=True):
        assert {name: repr(value) for name, value in row.items()} == {
            name: repr(float(v) if isinstance(v, np.floating) else v) for name, v in expected.items()
        }
    assert str(back.protocol) == str(result.protocol) and back.protocol == result.protocol
    assert back.config == result.config and back.config["algorithm"] == "Lockstep" and back.config["outer_lr"] == "0.01"
    assert (back.iteration, back.compiled, back.state) == (3, result.compiled, None)
    same(back.best()[:2], result.best()[:2])
    assert back.best()[2:] == result.best()[2:]


def test_without_a_template_arrays_come_by_path(result, tmp_path):
    result.save(tmp_path)
    back = fb.load_result(tmp_path)
    expected = jax.tree_util.tree_flatten_with_path(result.x)[0]
    assert list(back.x) == [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in expected]
    for value, (_, leaf) in zip(back.x.values(), expected, strict=True):
        np.testing.assert_array_equal(value, leaf)


class Net(eqx.Module):
    layers: list[eqx.nn.Linear]
    name: str = eqx.field(static=True)
    scale: float = 0.5


def made(x, y, **more):
    """A result with any x and y."""
    template = fb.solve(Q.problem, Q.data, fb.Lockstep(**NUMBERS), Q.x, Q.y, 1, key=KEY)
    return dataclasses.replace(template, x=x, y=y, **more)


@pytest.fixture(scope="module")
def bare():
    return made(jnp.arange(3.0), jnp.asarray(2.0))


VARIABLES = {
    "one array": jnp.arange(3.0),
    "a number": jnp.asarray(0.5),
    "narrow": {"a": jnp.arange(4, dtype=jnp.bfloat16), "b": [jnp.ones((2, 3), jnp.float32), jnp.zeros((0, 2))]},
    "float8": {"a": jnp.ones(3, ml_dtypes.float8_e4m3fn)},
    "a module": Net([eqx.nn.Linear(3, 2, key=KEY), eqx.nn.Linear(2, 1, use_bias=False, key=KEY)], "n"),
    "a module and whole numbers": {"net": eqx.nn.Linear(2, 2, key=KEY), "steps": np.arange(3)},
    "blocks": {"own": fb.per_client(np.arange(8.0).reshape(4, 2)), "all": jnp.ones(2)},
    "ragged blocks": fb.per_client([np.ones(2), np.ones(3), np.ones(1), np.ones(2)]),
}


@pytest.mark.parametrize("what", VARIABLES)
def test_any_variable_comes_back(what, bare, tmp_path):
    x = VARIABLES[what]
    dataclasses.replace(bare, x=x).save(tmp_path)
    back = fb.load_result(tmp_path, like=(x, bare.y))
    floats = lambda tree: eqx.filter(tree, eqx.is_inexact_array)
    same(floats(back.x), floats(x))
    assert jax.tree.structure(back.x) == jax.tree.structure(x)
    fb.load_result(tmp_path)


def test_clients_own_lower_variables_and_their_table_come_back(tmp_path):
    q = quadratic(clients=3, sizes=((3, 3),))
    result = fb.solve(q.problem, q.data, fb.FedBiOAccLocal(**NUMBERS), q.x, q.y, 2, key=KEY)
    table = fb.ClientTable(
        ("a", "b", "c"),
        (1, 2, 3),
        {"loss": np.array([1.0, np.nan, 2.0])},
        {"loss": 1.5},
        {"loss": np.nan},
        {"loss": "c"},
        ("b",),
    )
    dataclasses.replace(result, clients=table).save(tmp_path)
    back = fb.load_result(tmp_path, like=(q.x, q.y))
    same(back.clients_y, result.clients_y)
    assert str(back.clients) == str(table)
    fb.load_result(tmp_path).predict(lambda x, y, row: row, np.ones((2, 1)), client=0)


def test_another_result_takes_its_place(bare, result, tmp_path):
    result.save(tmp_path)
    bare.save(tmp_path)
    assert not (tmp_path / saved.BEST).exists()
    np.testing.assert_array_equal(fb.load_result(tmp_path).x, bare.x)


OTHERS = {
    "another structure": (
        {"a": jnp.ones(2)},
        r"the saved x has no x\['a'\], and like= has one: it has x\['w'\], x\['z'\]",
    ),
    "less": ({"w": jnp.ones(2)}, r"the saved x has x\['z'\], and like= has none of that"),
    "another shape": (
        {"w": jnp.ones(3), "z": jnp.ones(())},
        r"the saved x\['w'\] is float64\[2\], and that of like= is float64\[3\]",
    ),
    "another dtype": (
        {"w": jnp.ones(2), "z": jnp.ones((), jnp.float32)},
        r"the saved x\['z'\] is float64\[\], and that of like= is float32\[\]",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_template_is_refused_with_the_leaf(what, bare, tmp_path):
    like, sentence = OTHERS[what]
    dataclasses.replace(bare, x={"w": jnp.ones(2), "z": jnp.ones(())}).save(tmp_path)
    with pytest.raises(fb.InputError, match=sentence):
        fb.load_result(tmp_path, like=(like, bare.y))
    with pytest.raises(fb.InputError, match="like= is a pair"):
        fb.load_result(tmp_path, like=like)


def cut(name, share=0.5):
    def blow(folder):
        file = folder / name
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])

    return blow


def changed(folder):
    head = json.loads((folder / saved.HEAD).read_text())
    (folder / saved.HEAD).write_text(json.dumps(head | {"format": 99}))


BLOWS = {
    "no folder": (lambda folder: [file.unlink() for file in folder.iterdir()] and folder.rmdir(), "there is no folder"),
    "no head": (lambda folder: (folder / saved.HEAD).unlink(), "there is no result.json in"),
    "no numbers": (lambda folder: (folder / saved.VARIABLES).unlink(), "variables.npz is missing"),
    "numbers cut": (cut(saved.VARIABLES), r"variables.npz cannot be read \(BadZipFile"),
    "rows cut": (cut(saved.HISTORY, 0.7), "history.csv cannot be read"),
    "head cut": (cut(saved.HEAD), r"result.json cannot be read \(JSONDecodeError"),
    "a later format": (changed, "of format 99, and this version of fedbilevel reads up to 1: update it"),
    "less than all": (
        lambda folder: (folder / saved.HEAD).write_text('{"format": 1, "arrays": {}}'),
        "is no result of",
    ),
    "a list": (lambda folder: (folder / saved.HEAD).write_text("[1]"), "is no result of fedbilevel"),
    "pickled": (
        lambda folder: np.savez(folder / saved.VARIABLES, x=np.array([{}], object)),
        r"variables.npz cannot be read \(ValueError",
    ),
    "other numbers": (
        lambda folder: np.savez(folder / saved.VARIABLES, x=np.ones(5), y=np.ones(())),
        r"variables.npz: x is float64\[5\], and result.json says float64\[3\]",
    ),
}


@pytest.mark.parametrize("what", BLOWS)
def test_what_is_not_whole_is_one_sentence(what, bare, tmp_path):
    blow, sentence = BLOWS[what]
    bare.save(tmp_path / "kept")
    blow(tmp_path / "kept")
    with pytest.raises(fb.InputError, match=sentence) as failure:
        fb.load_result(tmp_path / "kept")
    assert "\n" not in str(failure.value)


def test_where_it_cannot_be_saved_it_says_so(bare, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(fb.InputError, match=r"the result cannot be saved in .*file.*Name another folder"):
        bare.save(tmp_path / "file")
