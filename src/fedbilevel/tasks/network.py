"""The network of the image tasks: one hidden layer with ReLU, a body below it and a head above."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jaxtyping import Array, Float, Key

from ..arrays import on_device
from ..threefry import split_key, uniform

Layer = Mapping[str, Array]  # "weight" (inputs, outputs) and "bias" (outputs,)


def layer(key: Key[Array, ""], inputs: int, outputs: int) -> dict[str, Array]:
    """A dense layer, weight (inputs, outputs) and bias (outputs,), entries uniform in +-1/sqrt(inputs)."""
    bound = inputs**-0.5
    weight, bias = split_key(key, 2)
    return {
        "weight": on_device(uniform(weight, (inputs, outputs), bound)),
        "bias": on_device(uniform(bias, (outputs,), bound)),
    }


def hidden(body: Layer, a: Float[Array, " inputs"]) -> Float[Array, " hidden"]:
    """The hidden layer of one example."""
    return jax.nn.relu(a @ body["weight"] + body["bias"])


def logits(body: Layer, head: Layer, a: Float[Array, " inputs"]) -> Float[Array, " classes"]:
    """The logits of one example; body and head are layers."""
    return hidden(body, a) @ head["weight"] + head["bias"]
