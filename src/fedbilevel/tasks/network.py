"""The networks of the image tasks: a body below and a head above, which is one dense layer.

"mlp": one hidden layer with ReLU. "cnn": two convolutions, each with group normalisation and ReLU; it has far fewer numbers
than images have pixels times units, and normalises by nothing but the row's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ..arrays import held, on_device
from ..errors import check
from ..threefry import split_key, uniform

MODELS = ("mlp", "cnn")
CHANNELS, WINDOW, GROUPS = (8, 16), 3, 4
LARGE = 16  # pixels of a side, from which the first convolution takes every other place too

Layer = Mapping[
    str, Array
]  # "weight" (inputs, outputs) and "bias" (outputs,); of a convolution "scale" and "shift" too
Body = Layer | Mapping[str, Layer]  # one layer, or "first" and "second", convolutions


def layer(key: Key[Array, ""], inputs: int, outputs: int) -> dict[str, Array]:
    """A dense layer, weight (inputs, outputs) and bias (outputs,), entries uniform in +-1/sqrt(inputs)."""
    bound = inputs**-0.5
    weight, bias = split_key(key, 2)
    return {
        "weight": on_device(uniform(weight, (inputs, outputs), bound)),
        "bias": on_device(uniform(bias, (outputs,), bound)),
    }


def convolutions(key: Key[Array, ""], inputs: int) -> tuple[dict[str, dict[str, Array]], int]:
    """The body of "cnn" for square images of `inputs` pixels, and how many numbers it makes of one.

    Raises:
        InputError: images that are not square.
    """
    side = math.isqrt(inputs)
    check(side * side == inputs, f'the model "cnn" takes square images; a row has {inputs} pixels.')
    body, channels = {}, 1
    for name, own, out in zip(("first", "second"), split_key(key, 2), CHANNELS, strict=True):
        whole = layer(own, WINDOW**2 * channels, out)
        body[name] = {
            "weight": whole["weight"].reshape(WINDOW, WINDOW, channels, out),
            "scale": held(np.ones(out)),
            "shift": held(np.zeros(out)),
        }
        side, channels = -(-side // _stride(name, side)), out
    return body, side * side * channels


def hidden(body: Body, a: Float[Array, " inputs"]) -> Float[Array, " hidden"]:
    """What the body makes of one example."""
    if "weight" in body:
        dense = cast(Layer, body)
        return jax.nn.relu(a @ dense["weight"] + dense["bias"])
    side = math.isqrt(a.shape[0])
    image = a.reshape(1, side, side, 1)
    for name in ("first", "second"):
        image = _convolved(cast(Layer, body[name]), image, _stride(name, image.shape[1]))
    return image.reshape(-1)


def logits(body: Body, head: Layer, a: Float[Array, " inputs"]) -> Float[Array, " classes"]:
    """The logits of one example."""
    return hidden(body, a) @ head["weight"] + head["bias"]


def _stride(name: str, side: int) -> int:
    return 2 if name == "second" or side > LARGE else 1


def _convolved(own: Layer, image: Float[Array, "1 side side inputs"], stride: int) -> Float[Array, "1 out out outputs"]:
    """ReLU of the normalised convolution; no bias, which the normalisation would take away again."""
    weight = own["weight"]
    dtype = jnp.result_type(image, weight)
    image = jax.lax.conv_general_dilated(
        image.astype(dtype), weight.astype(dtype), (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    groups = image.reshape(-1, GROUPS, image.shape[-1] // GROUPS)
    mean = groups.mean(axis=(0, 2), keepdims=True)
    spread = jnp.mean((groups - mean) ** 2, axis=(0, 2), keepdims=True)
    normal = ((groups - mean) * jax.lax.rsqrt(spread + 1e-5)).reshape(image.shape)
    each = lambda name: own[name][None, None, None]
    return jax.nn.relu(normal * each("scale") + each("shift"))
