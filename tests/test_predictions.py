"""`result.predict`: what a model says of new rows, at the returned x and y."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.threefry import new_key

ROWS = {"a": np.arange(14.0).reshape(7, 2), "b": np.arange(7)}


@pytest.fixture(scope="module")
def result():
    loss = lambda x, y, row: 0.5 * (row["a"] @ y - row["b"]) ** 2 * 0.01 + 0.5 * jnp.exp(x) * y @ y
    rows = {"a": ROWS["a"], "b": ROWS["b"].astype(float)}
    data = fb.FederatedData.stack([rows], [rows])
    algorithm = fb.Lockstep(inner_lr=0.02, hessian_lr=0.02, outer_lr=0.02)
    return fb.solve(fb.Problem(loss, loss), data, algorithm, jnp.zeros(()), jnp.ones(2), 3, key=new_key(0), check=False)


def model(x, y, row):
    return {"score": row["a"] @ y, "far": jnp.stack([row["b"] > 3, row["b"] > 5])}


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_each_row_is_what_the_model_says_of_it(result, size):
    found = result.predict(model, ROWS, batch_size=size)
    np.testing.assert_allclose(found["score"], ROWS["a"] @ np.asarray(result.y), rtol=1e-12)
    np.testing.assert_array_equal(found["far"], np.stack([ROWS["b"] > 3, ROWS["b"] > 5], 1))
    many = result.predict(lambda x, y, rows: rows["a"] @ y, ROWS, batched=True, batch_size=size)
    np.testing.assert_allclose(many, found["score"], rtol=1e-12)


def test_a_table_is_prepared_as_it_was_before(result):
    class Twice:
        def rows(self, given):
            return {"a": 2 * np.asarray(given), "b": np.zeros(len(given))}

    found = result.predict(model, ROWS["a"].tolist(), Twice())
    np.testing.assert_allclose(found["score"], 2 * ROWS["a"] @ np.asarray(result.y), rtol=1e-12)


def test_at_a_clients_own_y(result):
    own = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    several = dataclasses.replace(result, clients_y=own)
    np.testing.assert_allclose(several.predict(model, ROWS, client=1)["score"], ROWS["a"][:, 1], rtol=1e-12)
    for client in (3, -1, 0.5):
        with pytest.raises(fb.InputError, match="client= is a client's place, from 0 to 2; got"):
            several.predict(model, ROWS, client=client)
    with pytest.raises(fb.InputError, match="these have none: leave it out"):
        result.predict(model, ROWS, client=0)


def test_modules_are_models(result):
    module = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    held = dataclasses.replace(result, y=module)
    found = held.predict(lambda x, y, row: y(row["a"].astype(float)), ROWS, batch_size=4)
    np.testing.assert_allclose(found, jax.vmap(module)(jnp.asarray(ROWS["a"])), rtol=1e-10)


BAD = {
    "model": (3, ROWS, {}, r"predict\(model\) is a function of \(x, y, row\); got 3"),
    "prepared": (model, ROWS, {"prepared": 3}, r"predict\(prepared=...\) has a method rows\(table\); got int"),
    "unequal": (
        model,
        {"a": np.ones((3, 2)), "b": np.ones(2)},
        {},
        "rows of predict are a pytree of arrays, rows first, equally",
    ),
    "no array": (model, {"a": 1.0}, {}, "rows of predict are a pytree of arrays"),
    "none": (model, {"a": np.ones((0, 2)), "b": np.ones(0)}, {}, "there are no rows to predict"),
    "fails": (lambda x, y, row: row["z"], ROWS, {}, "the model failed on .*KeyError: 'z'"),
    "no rows": (
        lambda x, y, rows: rows["a"].sum(),
        ROWS,
        {"batched": True},
        "the model must return arrays, .* rows first, 7 of them",
    ),
    "size": (model, ROWS, {"batch_size": 0}, "batch_size= is a whole number of at least 1; got 0"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_meant_is_refused(result, what):
    fn, rows, more, sentence = BAD[what]
    with pytest.raises(fb.InputError, match=sentence):
        result.predict(fn, rows, **more)
