"""The networks of the image tasks: convolutions in numpy, how many numbers they are, a run, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.compare import Shipped
from fedbilevel.errors import InputError
from fedbilevel.settings import best
from fedbilevel.tasks import hyper_representation, ridge
from fedbilevel.tasks.base import Options
from fedbilevel.tasks.network import GROUPS, convolutions, hidden
from helpers.differences import moved


def count(*trees) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(trees))


def convolved(image, own, stride):
    """(side, side, inputs) -> its convolution in numpy, normalised by groups of channels, ReLU."""
    weight = np.asarray(own["weight"])
    side, window = image.shape[0], weight.shape[0]
    out = -(-side // stride)
    lack = max((out - 1) * stride + window - side, 0)  # of which the larger half comes after the image
    padded = np.pad(image, ((lack // 2, lack - lack // 2),) * 2 + ((0, 0),))
    made = np.array([
        [np.einsum("hwi,hwio->o", padded[r * stride : r * stride + window, c * stride : c * stride + window], weight)
         for c in range(out)]
        for r in range(out)
    ])  # fmt: skip
    groups = made.reshape(out * out, GROUPS, -1)
    groups = groups - groups.mean(axis=(0, 2), keepdims=True)
    normal = (groups / np.sqrt((groups**2).mean(axis=(0, 2), keepdims=True) + 1e-5)).reshape(made.shape)
    return np.maximum(normal * np.asarray(own["scale"]) + np.asarray(own["shift"]), 0)


@pytest.mark.parametrize(("side", "first"), [(8, 1), (17, 2)])
def test_convolutions_are_what_numpy_says(side, first):
    body, width = convolutions(jax.random.key(0), side * side)
    body = moved(body, size=0.1)
    image = np.random.default_rng(0).normal(size=(side, side, 1))
    expected = convolved(convolved(image, body["first"], first), body["second"], 2).reshape(-1)
    got = hidden(body, jnp.asarray(image.reshape(-1)))
    assert got.shape == (width,) == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_they_have_few_numbers_and_take_square_images():
    task = hyper_representation(model="cnn")
    assert count(task.x, task.y) < 60_000
    body, width = convolutions(jax.random.key(0), 784)
    assert count(body) + 10 * (width + 1) == 9_122
    with pytest.raises(InputError, match="takes square images; a row has 20 pixels"):
        convolutions(jax.random.key(0), 20)


@pytest.mark.parametrize("model", ["cnn", "mlp"])
def test_a_few_iterations(model):
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        task = hyper_representation(model=model, clients=4, partition="shards")
        steps = fb.Lockstep(inner_lr=0.1, hessian_lr=0.1, outer_lr=0.1, local_steps=2)
        run = fb.solve(task.problem, task.data, steps, task.x, task.y, 4, key=task.key, metrics=task.metrics)
    losses = [row["test_loss"] for row in run.history]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert all(np.abs(new - old).max() > 0 for new, old in zip(*map(jax.tree.leaves, (run.x, task.x)), strict=True))


def test_models_that_are_not_there_are_refused():
    assert jax.tree.structure(hyper_representation(model="mlp").x) == jax.tree.structure(hyper_representation().x)
    with pytest.raises(InputError, match=r"model for hyper-representation.*did you mean 'cnn'"):
        hyper_representation(model="cnm")
    with pytest.raises(InputError, match="the task ridge has no models to choose from"):
        ridge(model="mlp")


def test_steps_and_settings_are_each_models_own():
    source = lambda model: Shipped("hyper-representation", Options("mnist", model=model))
    assert source(None).filed("lockstep") == source("mlp").filed("lockstep") == ("hyper-representation", "mnist")
    assert source("cnn").filed("lockstep") == ("hyper-representation-cnn", "mnist")
    assert best(*source("cnn").filed("lockstep"), "lockstep")
    told = [source(model).config()["options"] for model in (None, "cnn")]
    assert "model" not in told[0] and told[1]["model"] == "cnn"  # pyright: ignore[reportArgumentType, reportCallIssue, reportIndexIssue, reportOptionalSubscript]
