"""Logistic regression of two classes, and penalties by group of columns: what `bank` and `hearts` are made of."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..arrays import held
from .network import Layer

BIAS_PENALTY = 0.01


def first(features: int) -> dict[str, Array]:
    """The start: weight (features,) and bias () of zeros."""
    return {"weight": held(np.zeros(features)), "bias": held(np.zeros(()))}


def logit(y: Layer, a: Float[Array, " features"]) -> Float[Array, ""]:
    """The logit of class 1, of one example."""
    return a @ y["weight"] + y["bias"]


def logits(y: Layer, a: Float[Array, "rows features"]) -> Float[Array, "rows 2"]:
    """The logits of both classes, of which that of class 0 is zero."""
    one = a @ y["weight"] + y["bias"][None]
    return jnp.stack([jnp.zeros_like(one), one], axis=1)


def cross_entropy(one: Float[Array, ""], label: Int[Array, ""]) -> Float[Array, ""]:
    """-log of the probability of the label, 0 or 1, by the logit of class 1."""
    return jax.nn.softplus(jnp.where(label == 1, -one, one))


def penalty(x: Float[Array, " groups"], y: Layer, sizes: Sequence[int]) -> Float[Array, ""]:
    """sum_k exp(x_k) |weights of group k|^2 / 2, and a small fixed penalty on the bias.

    Args:
        sizes: how many columns each group has, one group's after the other's.
    """
    member = held(np.repeat(np.eye(len(sizes)), sizes, axis=1), x.dtype)
    return 0.5 * (jnp.sum(jnp.exp(x) @ member * y["weight"] ** 2) + BIAS_PENALTY * y["bias"] ** 2)
