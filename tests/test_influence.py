"""Which leaves a loss depends on, by its program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import fedbilevel as fb
from fedbilevel.influence import influence, named
from fedbilevel.problem import Rows

still = jax.lax.stop_gradient
X = {"a": jnp.zeros(()), "off": jnp.zeros(2)}
Y = {name: jnp.zeros(3) for name in ("w", "scan", "held", "still", "rounded", "off")}
ROWS = Rows(jnp.zeros((4, 3)), jnp.full(4, 0.25), jnp.int32(4))  # zeros: no number tells what the program does


def inner(x, y, e):
    def body(carry, _):
        moved, held = carry
        return (moved * y["scan"] + still(held), held), None

    (moved, _), _ = jax.lax.scan(body, (e, y["held"]), None, length=2)
    rectified = jax.jit(jax.nn.relu)(y["w"] * 0.0) + still(y["still"])
    return jnp.sum(moved + rectified * x["a"]) + jnp.sum(jnp.round(y["rounded"]))


def outer(x, y, e):
    return y["off"] @ e


class Own(fb.Problem):
    """The same, by oracles that nobody differentiates."""

    def inner_gradient(self, x, y, rows):
        return still(super().inner_gradient(x, y, rows))

    def inner_gradient_x(self, x, y, rows):
        return still(super().inner_gradient_x(x, y, rows))

    def outer_gradients(self, x, y, rows):
        return still(super().outer_gradients(x, y, rows))

    def inner_value(self, x, y, rows):
        return super().inner_value(x, y, rows)


@pytest.mark.parametrize("kind", [fb.Problem, Own])
@pytest.mark.parametrize(
    ("level", "variable", "names"),
    [("inner", "y", ["w", "scan"]), ("inner", "x", ["a"]), ("outer", "y", ["off"]), ("outer", "x", [])],
)
def test_leaves_with_influence(kind, level, variable, names):
    found = influence(kind(inner, outer), level, variable, X, Y, ROWS)
    assert set(named(found, variable, True)) == {f"{variable}[{name!r}]" for name in names}
    assert len(named(found, variable)) + len(names) == len({"x": X, "y": Y}[variable])
