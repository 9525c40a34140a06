"""check_problem sees what is wrong at y = 0, with weights, with padding, at both levels, and in ids."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.indices import outside

DRAW = np.random.default_rng(0)
ROWS = [
    {"a": DRAW.normal(size=(n, 2)), "b": DRAW.normal(size=n) + n, "id": np.arange(n) % 3, "t": np.arange(n) % 2}
    for n in (2, 4)
]
DATA = fb.FederatedData.stack(ROWS, ROWS[::-1], weights=[1.0, 3.0])
X, Y = jnp.zeros(3), jnp.zeros(2)


def inner(x, y, e):
    return 0.5 * (e["a"] @ y - e["b"]) ** 2 + 0.5 * jnp.exp(x[e["id"]]) * jnp.sum(y**2)


def outer(x, y, e):
    return 0.5 * (e["a"] @ y - e["b"]) ** 2 + 0.1 * y[e["t"]] * jnp.sum(x)


def mean(loss, weigh):
    def batched(x, y, examples, weights):
        return weigh(jax.vmap(lambda e: loss(x, y, e))(examples), weights)

    return batched


RIGHT = lambda values, weights: jnp.sum(values * weights)
WRONG = {
    "ignores weights": lambda values, weights: jnp.mean(values),
    "ignores padding only": lambda values, weights: (
        jnp.sum(jnp.where(weights > 0, values, 0)) / jnp.sum((weights > 0).astype(weights.dtype))
    ),
    "counts padding": lambda values, weights: jnp.sum(values * weights) + 1e-3 * jnp.sum(values),
    "normalises": lambda values, weights: jnp.sum(values * weights) / jnp.sum(weights) + 0.1 * jnp.sum(weights**2),
}


def failures(problem, data=DATA, x=X, y=Y):
    with pytest.raises(fb.testing.CheckFailed) as failed:
        fb.testing.check_problem(problem, data, x, y)
    return [what for what, good, _ in failed.value.report.lines if not good], str(failed.value)


@pytest.mark.slow
def test_what_is_right_passes():
    assert fb.testing.check_problem(fb.Problem(inner, outer), DATA, X, Y).passed
    assert fb.testing.check_problem(fb.Problem(mean(inner, RIGHT), mean(outer, RIGHT), batched=True), DATA, X, Y).passed


@pytest.mark.parametrize("level", ["inner", "outer"])
@pytest.mark.parametrize(
    "fault", ["ignores weights", *(pytest.param(name, marks=pytest.mark.slow) for name in list(WRONG)[1:])]
)
def test_a_batched_loss_that_is_no_weighted_mean_fails(level, fault):
    losses = {"inner": mean(inner, RIGHT), "outer": mean(outer, RIGHT)}
    losses[level] = mean({"inner": inner, "outer": outer}[level], WRONG[fault])
    found, _ = failures(fb.Problem(**losses, batched=True))
    assert any(f"{level} weights" in what for what in found)
    other = {"inner": "outer", "outer": "inner"}[level]
    assert not any(f"{other} weights" in what for what in found)


class Signs(fb.Problem):
    """Cross products of the wrong sign: at y = 0 they are zero."""

    def cross_vector(self, x, y, v, rows):
        return jax.tree.map(jnp.negative, super().cross_vector(x, y, v, rows))


class Unweighted(fb.Problem):
    """A gradient of its own over all rows alike, padding too."""

    def inner_gradient(self, x, y, rows):
        alike = jnp.full_like(rows.weights, 1 / rows.weights.shape[0])
        return super().inner_gradient(x, y, fb.Rows(rows.examples, alike, rows.count))


class Direct(fb.Problem):
    """An outer gradient in x that is off by a factor, and zero where y is."""

    def outer_gradients(self, x, y, rows):
        d_x, d_y = super().outer_gradients(x, y, rows)
        return 2 * d_x, d_y


@pytest.mark.parametrize(
    ("kind", "what"), [(Signs, "cross_vector"), (Unweighted, "inner_gradient"), (Direct, "outer_gradients, x")]
)
def test_oracles_that_are_wrong_fail_from_a_start_of_zeros(kind, what):
    found, _ = failures(kind(inner, outer))
    assert f"client 0: {what}" in found


# Ids ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("level", "wrong"), [("inner", 3), ("outer", -4), ("outer", 7)])
def test_ids_out_of_range_are_named(wrong, level):
    bad = [ROWS[0], {**ROWS[1], "id": np.array([0, 1, wrong, 2])}]
    data = fb.FederatedData.stack(bad, bad, names=["north", "south"])
    plain = lambda x, y, e: 0.5 * (e["a"] @ y - e["b"]) ** 2 + 0.5 * jnp.sum(y**2) + jnp.sum(x) * 0.1
    by_id = lambda x, y, e: plain(x, y, e) + x[e["id"]] ** 2
    losses = {"inner": plain, "outer": plain, level: by_id}
    found, text = failures(fb.Problem(**losses), data)
    assert [what for what in found if "indices" in what] == [f"south: {level} indices"]
    assert f"the {level} loss uses index {wrong} on an axis of 3" in text
    losses[level] = lambda x, y, e: plain(x, y, e) + x[jnp.clip(e["id"], 0, 2)] ** 2
    assert fb.testing.check_problem(fb.Problem(**losses), data, X, Y).passed


def scanned(x, i):
    return jax.lax.scan(lambda c, j: (c + x[j], x[j] * c), 0.0, i[None])[0]


@pytest.mark.parametrize(
    "use",
    [
        lambda x, i: x[i],
        lambda x, i: jnp.take(x, i),
        lambda x, i: x.reshape(1, 5)[0, i],
        lambda x, i: jnp.sum(x.at[i].add(1.0)),
        lambda x, i: jax.lax.dynamic_slice(x, (i - 1,), (2,))[0],
        lambda x, i: jnp.take_along_axis(x, i[None], 0)[0],
        lambda x, i: jax.jit(lambda x: x[i])(x),
        lambda x, i: jax.checkpoint(lambda x: x[i])(x),
        lambda x, i: jnp.sum(jnp.where(jnp.arange(5) == i, x, 0)) + x[jnp.clip(i, 0, 4)] * 0 + x[i],
        scanned,
    ],
)
@pytest.mark.parametrize("batched", [True, False])
def test_every_way_of_indexing_is_seen(use, batched):
    x, ids = jnp.ones(5), jnp.asarray([4, 2, 1])
    call = lambda ids: outside(lambda x: jax.vmap(lambda i: use(x, i))(ids) if batched else [use(x, i) for i in ids], x)
    assert call(ids) == []
    assert set(call(ids.at[1].set(9))) == {(9, 5)}
