"""Layers that take statistics of a batch, or draw for themselves: refused in a sentence, or right."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import fedbilevel as fb
from helpers.modules import CHANNELS, DROPPED, Equinox, Linen, Nnx, data, problem
from helpers.users import as_users_do

KEY, X = jax.random.key(0), {"decay": np.float32(-4)}
IMAGE = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
RNGS = nnx.Rngs(0)


@pytest.fixture(autouse=True)
def users():
    with as_users_do():
        yield


def norm():
    return nnx.BatchNorm(CHANNELS, rngs=RNGS)


def solve(apply, y, random=False):
    steps = {"inner_lr": 0.1, "hessian_lr": 0.1, "outer_lr": 0.1}
    return fb.solve(problem(apply, random), data(), fb.Lockstep(**steps), X, y, 2, key=KEY, check=False)


def refused(apply, y, random=False):
    with pytest.raises(fb.InputError) as error:
        solve(apply, y, random)
    return str(error.value)


def split(model):
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    return lambda y, image, key: nnx.merge(graph, y, rest)(image, key), parameters


# Batch normalisation --------------------------------------------------------------------------------------------------


def test_a_module_of_nnx_that_takes_statistics_is_refused():
    for apply, y in (split(Nnx(RNGS, norm())), (lambda y, image, key: y(image, key), Nnx(RNGS, norm()))):
        assert "takes statistics of a batch" in refused(apply, y)


def test_with_running_statistics_it_is_right():
    model = Nnx(RNGS, norm())
    model.eval()
    result = solve(lambda y, image, key: y(image, key), model)
    assert jnp.array_equal(result.y.norm.mean[...], model.norm.mean[...])  # they stay
    assert not jnp.array_equal(result.y.norm.scale[...], model.norm.scale[...])
    apply, y = split(model)
    parts = solve(apply, y)
    for ours, theirs in zip(jax.tree.leaves(parts.y), jax.tree.leaves(nnx.state(result.y, nnx.Param)), strict=True):
        assert jnp.allclose(ours, theirs, atol=1e-6)


def test_a_module_of_linen_that_takes_statistics_is_refused_by_its_name():
    taking = Linen(linen.BatchNorm(use_running_average=False, parent=None))
    variables = taking.init(KEY, IMAGE)
    train = lambda y, image, key: taking.apply({**variables, "params": y}, image, mutable=["batch_stats"])[0]
    assert "takes statistics of a batch" in refused(train, variables["params"])

    running = Linen(linen.BatchNorm(use_running_average=True, parent=None))
    apply = lambda y, image, key: running.apply({**variables, "params": y}, image)
    assert jnp.isfinite(solve(apply, variables["params"]).x["decay"])


def test_running_statistics_of_linen_are_not_optimised():
    running = Linen(linen.BatchNorm(use_running_average=True, parent=None))
    variables = running.init(KEY, IMAGE)
    words = refused(lambda y, image, key: running.apply(y, image), variables)
    assert words.startswith("y has running statistics beside the parameters") and "variables['params']" in words


def test_a_module_of_equinox_that_takes_statistics_is_refused():
    model, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(CHANNELS, "batch", mode="batch")
    y = Equinox(KEY, lambda hidden: hidden)
    y = eqx.tree_at(lambda m: m.norm, y, model)

    def apply(y, image, key):
        hidden, _ = y.norm(y.conv(image[None]), state)
        return y.head(jnp.tanh(hidden).ravel())

    assert "batch normalisation over an axis of rows?" in refused(apply, y)
    assert jnp.isfinite(solve(lambda y, image, key: apply(eqx.nn.inference_mode(y), image, key), y).x["decay"])


def test_flax_is_as_it_was_afterwards():
    before = nnx.BatchNorm.__call__, nnx.Dropout.__call__
    refused(*split(Nnx(RNGS, norm())))
    assert (nnx.BatchNorm.__call__, nnx.Dropout.__call__) == before
    model = Nnx(RNGS, norm())
    model(IMAGE)  # with statistics of its own, outside the library
    assert jnp.any(model.norm.mean[...] != 0)


# Dropout --------------------------------------------------------------------------------------------------------------


class Own(Nnx):
    """Its dropout draws from its own key."""

    def __call__(self, image, key=None):
        return self.head(self.drop(jnp.tanh(self.norm(self.conv(image[..., None]))).ravel()))


def test_a_module_of_nnx_that_draws_for_itself_is_refused():
    model = Own(RNGS, drop=nnx.Dropout(DROPPED, rngs=RNGS))
    for random in (False, True):
        assert "draws from its own key" in refused(lambda y, image, key: y(image, key), model, random)
    model.eval()
    assert jnp.isfinite(solve(lambda y, image, key: y(image, key), model).x["decay"])
