"""One small convolutional network in equinox, flax.nnx and flax.linen, on images of 8x8, with GroupNorm and dropout."""

from __future__ import annotations

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

import fedbilevel as fb

CHANNELS, LABELS, DROPPED = 4, 3, 0.2
FLAT = CHANNELS * 6 * 6


class Equinox(eqx.Module):
    """What a user of equinox writes; `norm` may be another layer."""

    conv: eqx.nn.Conv2d
    norm: Any
    drop: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key, norm=None):
        one, two = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(1, CHANNELS, 3, key=one)
        self.norm = eqx.nn.GroupNorm(2, CHANNELS) if norm is None else norm
        self.drop, self.head = eqx.nn.Dropout(DROPPED), eqx.nn.Linear(FLAT, LABELS, key=two)

    def __call__(self, image, key=None):
        hidden = jnp.tanh(self.norm(self.conv(image[None]))).ravel()
        return self.head(self.drop(hidden, key=key, inference=key is None))


class Nnx(nnx.Module):
    """The same in flax.nnx."""

    def __init__(self, rngs, norm=None, drop=None):
        self.conv = nnx.Conv(1, CHANNELS, (3, 3), padding="VALID", rngs=rngs)
        self.norm = nnx.GroupNorm(CHANNELS, num_groups=2, rngs=rngs) if norm is None else norm
        self.drop = nnx.Dropout(DROPPED) if drop is None else drop
        self.head = nnx.Linear(FLAT, LABELS, rngs=rngs)

    def __call__(self, image, key=None):
        hidden = jnp.tanh(self.norm(self.conv(image[..., None]))).ravel()
        return self.head(self.drop(hidden, deterministic=key is None, rngs=key))


class Linen(linen.Module):
    """The same in flax.linen."""

    norm: Any = None

    @linen.compact
    def __call__(self, image, key=None):
        hidden = linen.Conv(CHANNELS, (3, 3), padding="VALID")(image[..., None])
        hidden = jnp.tanh((self.norm or linen.GroupNorm(2))(hidden)).ravel()
        hidden = linen.Dropout(DROPPED)(hidden, deterministic=key is None, rng=key)
        return linen.Dense(LABELS)(hidden)


@functools.cache
def data(sizes=((6, 4), (9, 5), (4, 6))):
    """Ragged clients, in 32 bits."""
    draw = np.random.default_rng(0)

    def rows(n):
        return {"image": draw.normal(size=(n, 8, 8)).astype(np.float32), "label": draw.integers(0, LABELS, n)}

    return fb.FederatedData.stack(*([rows(n) for n in level] for level in zip(*sizes, strict=True)))


def problem(apply, random=True):
    """x is how strongly weights are held small; `apply(y, image, key)` gives the logits."""

    def held(x, y):
        leaves = jax.tree.leaves(eqx.filter(y, eqx.is_inexact_array))
        return jnp.exp(x["decay"]) * sum(jnp.sum(leaf**2) for leaf in leaves)

    def inner(x, y, row, key=None):
        return cross_entropy(apply(y, row["image"], key), row["label"]) + held(x, y)

    def outer(x, y, row):
        return cross_entropy(apply(y, row["image"], None), row["label"])

    without = lambda x, y, row: inner(x, y, row)
    return fb.Problem(inner if random else without, outer, random=random)


cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
