"""Convolutions as products of matrices: the same numbers and derivatives, wherever they stand in a loss."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel import convolutions
from fedbilevel.convolutions import ByProducts, convolves
from fedbilevel.problem import bind
from fedbilevel.program import freeze
from helpers.quadratic import flat

EXACT = {"rtol": 0, "atol": 1e-12}
PADDINGS = ("VALID", "SAME", (1, 2), (-1, 0))


def primitives(function, *args):
    return str(jax.make_jaxpr(function)(*args))


@pytest.mark.parametrize("axes", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_values_and_derivatives_are_those_of_the_convolution(axes, last):
    draw, names = np.random.default_rng(0), "XYZ"[:axes]
    rows, weights = draw.normal(size=(2, 3, 7, 8, 6)[: axes + 2]), draw.normal(size=(4, 3, 3, 2, 2)[: axes + 2])
    how = (f"NC{names}", f"OI{names}", f"NC{names}")
    if last:
        rows, weights = np.moveaxis(rows, 1, -1), np.moveaxis(weights, (0, 1), (-1, -2))
        how = (f"N{names}C", f"{names}IO", f"N{names}C")
    for stride, padding, gap in itertools.product((1, 2), PADDINGS, (1, 2)):
        padding = padding if isinstance(padding, str) else [padding] * axes
        given = {"padding": padding, "rhs_dilation": (gap,) * axes, "dimension_numbers": how}
        convolved = functools.partial(jax.lax.conv_general_dilated, window_strides=(stride,) * axes, **given)
        same = ByProducts(convolved)
        assert "conv_general" in primitives(convolved, rows, weights)
        assert "conv_general" not in primitives(same, rows, weights)
        np.testing.assert_allclose(same(rows, weights), convolved(rows, weights), **EXACT)
        slopes = [jax.grad(lambda *at, f=f: jnp.sum(jnp.sin(f(*at))), (0, 1))(rows, weights) for f in (same, convolved)]
        np.testing.assert_allclose(flat(slopes[0]), flat(slopes[1]), **EXACT)


def conv(rows, weights, **more):
    return jax.lax.conv_general_dilated(rows, weights, (1, 1), [(0, 0), (0, 0)], **more)


ROWS, WEIGHTS = np.random.default_rng(0).normal(size=(2, 4, 6, 6)), np.random.default_rng(1).normal(size=(4, 4, 3, 3))


def test_images_with_channels_first_and_last():
    """What networks of images have; all kinds are among the slow tests."""
    for how in (("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NHWC")):
        rows, weights = (
            (ROWS, WEIGHTS) if how[0] == "NCHW" else (np.moveaxis(ROWS, 1, -1), WEIGHTS.transpose(2, 3, 1, 0))
        )
        convolved = lambda a, w, how=how: jax.lax.conv_general_dilated(a, w, (2, 2), "SAME", dimension_numbers=how)
        np.testing.assert_allclose(ByProducts(convolved)(rows, weights), convolved(rows, weights), **EXACT)


def test_those_in_nested_functions_too_and_rules_of_ones_own_stay():
    @jax.custom_jvp
    def halved(a):
        return a / 2

    halved.defjvp(lambda at, along: (halved(*at), 7 * along[0]))  # wrong on purpose: it is seen in the derivative
    whole = lambda rows, weights: jnp.sum(halved(jax.jit(conv)(rows, weights)) ** 2)
    assert convolves(jax.make_jaxpr(whole)(ROWS, WEIGHTS).jaxpr)
    for of in (lambda f: f, jax.grad):
        np.testing.assert_allclose(of(ByProducts(whole))(ROWS, WEIGHTS), of(whole)(ROWS, WEIGHTS), rtol=1e-12)


@pytest.mark.parametrize(
    "function",
    [
        lambda a: conv(a, WEIGHTS[:, :1], feature_group_count=4),
        lambda a: conv(a, WEIGHTS, lhs_dilation=(2, 2)),
        lambda a: conv(a, WEIGHTS[:, :, :1], batch_group_count=2),
        lambda a: jnp.sum(a),
    ],
    ids=["groups", "transposed", "groups of rows", "none"],
)
def test_others_stay_as_they_are(function):
    assert not convolves(jax.make_jaxpr(function)(ROWS).jaxpr)
    np.testing.assert_array_equal(ByProducts(function)(ROWS), function(ROWS))


def test_patches_that_would_take_much_memory_are_not_made(monkeypatch):
    program = jax.make_jaxpr(conv)(ROWS, WEIGHTS).jaxpr
    assert convolves(program)
    monkeypatch.setattr(convolutions, "ROOM", 9 * 4 * 16 - 1)
    assert not convolves(program)


# In a problem ---------------------------------------------------------------------------------------------------------


def logits(y, row):
    hidden = jnp.tanh(conv(row["image"][None], y["w"])).reshape(-1)
    return hidden @ y["v"]


def inner(x, y, row):
    return (logits(y, row) - row["b"]) ** 2 + jnp.exp(x) * (jnp.sum(y["w"] ** 2) + jnp.sum(y["v"] ** 2))


def outer(x, y, row):
    return (logits(y, row) - row["b"]) ** 2


def given():
    draw = np.random.default_rng(0)
    rows = lambda n: {"image": draw.normal(size=(n, 4, 6, 6)), "b": draw.normal(size=n)}
    data = fb.FederatedData.stack(*([rows(n) for n in level] for level in ((5, 3, 4), (4, 6, 5))))
    return data, jnp.array(-1.0), {"w": jnp.asarray(WEIGHTS[:2]) / 6, "v": jnp.asarray(draw.normal(size=32)) / 6}


@pytest.mark.parametrize("held", [False, True], ids=["shared", "with arrays of its own"])
def test_a_run_with_convolutions_is_that_without_the_replacement_but_for_rounding(monkeypatch, held):
    """Losses that hold arrays go another way."""
    data, x, y = given()
    shift = jnp.asarray(np.zeros(()))
    lower = (lambda x, y, row: inner(x, y, row) + shift) if held else inner
    steps = {"inner_lr": 0.05, "hessian_lr": 0.05, "outer_lr": 0.05}

    def ends(engine):
        problem = fb.Problem(lower, outer)
        result = fb.solve(
            problem, data, fb.Lockstep(**steps), x, y, 3, key=jax.random.key(0), engine=engine, check=False
        )
        return flat((result.x, result.y))

    ours = ends(fb.Simulation()), ends(fb.Loopback())
    monkeypatch.setattr("fedbilevel.program.convolves", lambda _: False)
    plain = ends(fb.Loopback())
    for found in ours:
        np.testing.assert_allclose(found, plain, **EXACT)
        assert np.abs(found - flat((x, y))).max() > 1e-3


def test_a_frozen_problem_has_them_and_a_reference_too():
    data, x, y = given()
    frozen = freeze(bind(fb.Problem(inner, outer), None, None), x, y, data)
    assert isinstance(frozen.inner, ByProducts) and isinstance(frozen.outer, ByProducts)
    row = jax.tree.map(lambda leaf: leaf[0], data.inner.rows)
    assert "conv_general" not in primitives(frozen.inner, x, y, row)
    np.testing.assert_allclose(frozen.inner(x, y, row), inner(x, y, row), rtol=1e-12)
    plain = freeze(bind(fb.Problem(lambda x, y, row: x**2 + jnp.sum(y["v"] ** 2), outer), None, None), x, y, data)
    assert isinstance(plain.inner, ByProducts)  # the outer loss has some
