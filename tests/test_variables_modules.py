"""Modules of equinox and flax are x and y as they are, in 32 bits, as users have them."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fedbilevel as fb
from fedbilevel.variables import trainable
from helpers.modules import Equinox, Linen, Nnx, cross_entropy, data, problem
from helpers.users import as_users_do

KEY, DECAY = jax.random.key(0), {"decay": np.float32(-4)}


@pytest.fixture(autouse=True)
def users():
    with as_users_do():
        yield


def of_linen():
    module = Linen()
    parameters = module.init(KEY, data().inner.rows["image"][0])["params"]
    return parameters, lambda y, image, key: module.apply({"params": y}, image, key)


def of_nnx():
    graph, parameters = nnx.split(Nnx(nnx.Rngs(0)))
    return parameters, lambda y, image, key: nnx.merge(graph, y)(image, key)


CALLED = lambda y, image, key: y(image, key)
KINDS = {
    "equinox": lambda: (Equinox(KEY), CALLED),
    "a module of flax.nnx": lambda: (Nnx(nnx.Rngs(0)), CALLED),
    "its state": of_nnx,
    "with keys of its own": lambda: (Nnx(nnx.Rngs(0), drop=nnx.Dropout(0.2, rngs=nnx.Rngs(1))), CALLED),
    "flax.linen": of_linen,
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in ("equinox", "its state") else pytest.mark.slow) for kind in KINDS]
)
def test_modules_of_jax_libraries_are_y_and_come_back_as_they_were(kind):
    y, apply = KINDS[kind]()
    steps = {"inner_lr": 0.1, "hessian_lr": 0.1, "outer_lr": 0.1}
    algorithm = fb.Lockstep(**steps, batch_size=3, local_steps=2)
    run = lambda engine: fb.solve(problem(apply), data(), algorithm, DECAY, y, 2, key=KEY, engine=engine, check=False)
    result, other = run(fb.Simulation(cohort=2)), run(fb.Loopback(cohort=2))
    assert type(result.y) is type(y)
    assert jax.tree.structure(result.y) == jax.tree.structure(y)
    leaves = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    for ours, theirs, before in zip(leaves(result.y), leaves(other.y), leaves(y), strict=True):
        assert ours.dtype == before.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    image = data().inner.rows["image"][0]
    assert not np.array_equal(apply(result.y, image, None), apply(y, image, None))


@pytest.mark.parametrize("kind", ["equinox", pytest.param("a module of flax.nnx", marks=pytest.mark.slow)])
def test_a_module_is_x_and_a_part_of_it_y(kind):
    """A body above, a head below."""
    model, _ = KINDS[kind]()
    body = lambda x, image: jnp.tanh(x.norm(x.conv(image[None] if kind == "equinox" else image[..., None]))).ravel()
    head = {"w": jnp.zeros((144, 3), jnp.float32)}
    logits = lambda x, y, row: cross_entropy(body(x, row["image"]) @ y["w"], row["label"])
    lower = lambda x, y, row: logits(x, y, row) + 0.05 * jnp.sum(y["w"] ** 2)
    found = fb.solve(fb.Problem(lower, logits), data(), fb.Lockstep(), model, head, 30, key=KEY, check=False)
    assert type(found.x) is type(model)
    judged = lambda x: float(fb.reference.value(fb.Problem(lower, logits), data(), x, head))
    assert judged(found.x) < judged(model)


def test_tied_weights_stay_tied_and_integers_stay():
    class Tied(eqx.Module):
        shared: eqx.nn.Shared
        seen: jax.Array

        def __init__(self, key):
            pair = eqx.nn.Embedding(5, 3, key=key), eqx.nn.Linear(3, 5, use_bias=False, key=key)
            self.shared = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)
            self.seen = jnp.array(7)

        def __call__(self, number):
            embed, out = self.shared()
            return out(jnp.tanh(embed(number)))

    rows = [{"from": np.arange(5), "to": np.roll(np.arange(5), i)} for i in range(3)]
    tied = fb.FederatedData.stack(rows, rows)
    upper = lambda x, y, row: cross_entropy(y(row["from"]), row["to"])
    lower = lambda x, y, row: upper(x, y, row) + jnp.exp(x) * jnp.sum(y.shared()[0].weight ** 2)
    y = Tied(KEY)
    result = fb.solve(fb.Problem(lower, upper), tied, fb.Lockstep(), jnp.array(-3.0), y, 10, key=KEY, check=False)
    embed, out = result.y.shared()
    np.testing.assert_array_equal(embed.weight, out.weight)
    assert not np.array_equal(embed.weight, y.shared()[0].weight)
    assert result.y.seen == 7 and len(jax.tree.leaves(eqx.filter(result.y, eqx.is_inexact_array))) == 1


@pytest.mark.parametrize("schedule", ["adam", "cosine"])
def test_optimisers_and_schedules_of_optax_move_x(schedule):
    chosen = {"adam": optax.adam(0.1), "cosine": optax.sgd(optax.cosine_decay_schedule(0.5, 4))}[schedule]
    y, apply = KINDS["equinox"]()
    algorithm = fb.FedNest(inner_lr=0.1, hessian_lr=0.1, inner_rounds=1, outer_optimizer=chosen)
    result = fb.solve(problem(apply), data(), algorithm, DECAY, y, 3, key=KEY, check=False)
    assert result.x["decay"] != DECAY["decay"]


def test_numbers_of_python_in_a_module_are_settings_and_elsewhere_variables():
    class Scaled(eqx.Module):
        weight: jax.Array
        rate: float

    arrays, rest = trainable({"module": Scaled(jnp.ones(2), 0.5), "decay": 0.5}, "y")
    assert arrays["module"].rate is None and rest["module"].rate == 0.5
    assert arrays["decay"] == 0.5 and arrays["module"].weight.shape == (2,)
