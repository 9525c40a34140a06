"""Outer losses of means as problems: against pooled differences, by batches and by blocks, and in bad input a sentence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.oracles import around_all
from fedbilevel.problem import blocks_of
from helpers.of_means import inner, of_means, outer_means, outer_of
from helpers.quadratic import flat
from helpers.users import as_users_do

Q = of_means()
GIVEN = Q.problem, Q.data, Q.x, Q.y


@pytest.mark.parametrize("method", ["exact", "cg", "neumann", "unrolled"])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_hypergradient_is_that_of_pooled_rows(weighted, method):
    q = of_means(weighted, seed=1)
    h = fb.reference.hypergradient(q.problem, q.data, q.x, q.y, method=method)
    np.testing.assert_allclose(flat(h), flat(q.hypergradient(q.x)), rtol=1e-6, atol=1e-9)


def test_values_and_means_are_those_of_pooled_rows():
    assert float(fb.reference.value(*GIVEN)) == pytest.approx(Q.value(Q.x), rel=1e-12)
    z = np.append(Q.y["w"], Q.y["b"])
    means = fb.reference.outer_means(*GIVEN)
    for name, expected in Q.means(Q.x, z).items():
        np.testing.assert_allclose(means[name], expected, rtol=1e-12)
    assert float(fb.reference.outer_value(*GIVEN)) == pytest.approx(float(outer_of(means)), rel=1e-12)


def test_means_are_no_means_of_clients_ratios():
    """The first client has one group alone: its own ratio of the other is 0 / 0."""
    own = [Q.problem.outer_value(Q.x, Q.y, Q.data.outer.client(i).all()) for i in range(4)]
    assert np.isnan(own[0]) and np.isfinite(own[1:]).all()
    assert np.isfinite(fb.reference.outer_value(*GIVEN))


def test_rows_that_count_otherwise_at_the_levels():
    """Clients that count by their rows: the outer rows' weights sum to other numbers than one."""
    data = fb.FederatedData.stack(Q.inner, Q.outer, weights="rows")
    p = [np.array([len(rows["t"]) for rows in level], float) for level in (Q.inner, Q.outer)]
    counts = [each / each.sum() for each in p]
    means = sum(share * rows["member"].mean(0) for share, rows in zip(counts[1], Q.outer, strict=True))
    found = fb.reference.outer_means(Q.problem, data, Q.x, Q.y)
    np.testing.assert_allclose(found["below"], means, rtol=1e-12)
    end = fb.solve(Q.problem, data, fb.Lockstep(inner_lr=0.1, hessian_lr=0.3, outer_lr=0.2), Q.x, Q.y, 4000,
                   key=jax.random.key(0), evaluate_every=4000)  # fmt: skip
    assert np.linalg.norm(flat(fb.reference.hypergradient(Q.problem, data, end.x, Q.y))) < 1e-7


@pytest.mark.slow
def test_a_batch_of_rows_gives_the_same():
    def batched_inner(x, y, rows, weights):
        return jnp.sum(weights * jax.vmap(lambda row: inner(x, y, row))(rows))

    def batched_means(x, y, rows, weights):
        each = jax.vmap(lambda row: outer_means(x, y, row))(rows)
        return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, axes=1), each)

    problem = fb.Problem(batched_inner, batched=True, outer_means=batched_means, outer_of=outer_of)
    h = fb.reference.hypergradient(problem, Q.data, Q.x, Q.y)
    np.testing.assert_allclose(flat(h), flat(fb.reference.hypergradient(*GIVEN)), rtol=1e-12)
    assert fb.testing.check_problem(problem, Q.data, Q.x, Q.y).passed


@pytest.mark.slow
def test_block_by_block_it_is_the_same():
    """One client of 20,000 rows beside small ones: its full batch is not padded."""
    q = of_means(False, seed=2, sizes=((40, 20_000), *[(3, 4)] * 12))
    level, around = q.data.outer, around_all(q.problem, q.data, q.x, q.y)
    rows, plain = level.client(jnp.asarray(0), level.cut(13)).all(), level.client(0).all()
    assert blocks_of(rows) is not None and blocks_of(plain) is None
    for name in ("outer_value", "outer_gradients", "means"):
        ours, theirs = (getattr(around, name)(q.x, q.y, each) for each in (rows, plain))
        np.testing.assert_allclose(flat(ours), flat(theirs), rtol=1e-10)
    steps = fb.Lockstep(inner_lr=0.1, hessian_lr=0.1, outer_lr=0.1)
    end = fb.solve(q.problem, q.data, steps, q.x, q.y, 1, key=jax.random.key(0))
    means = fb.reference.outer_means(q.problem, q.data, q.x, q.y)
    np.testing.assert_allclose(flat(end.state.of_means.means), flat(means), rtol=1e-9)


def test_f_of_a_client_s_own_means_is_not_summed_over_blocks():
    q = of_means(False, seed=2, sizes=((3, 4), (40, 20_000), *[(3, 4)] * 11))
    level = q.data.outer
    rows, plain = level.client(jnp.asarray(1), level.cut(13)).all(), level.client(1).all()
    assert blocks_of(rows) is not None
    for name in ("outer_value", "outer_gradients"):
        ours, theirs = (getattr(q.problem, name)(q.x, q.y, each) for each in (rows, plain))
        np.testing.assert_allclose(flat(ours), flat(theirs), rtol=1e-9)


def test_shares_of_booleans_and_means_of_whole_numbers():
    means = lambda x, y, row: {"much": row["t"] > 0, "one": 1, "b": (row["t"] - y["b"]) ** 2}
    problem = fb.Problem(inner, outer_means=means, outer_of=lambda m: m["b"] / m["much"] * m["one"])
    share = sum(p * np.mean(rows["t"] > 0) for p, rows in zip(Q.p, Q.outer, strict=True))
    found = fb.reference.outer_means(problem, Q.data, Q.x, Q.y)
    assert (float(found["much"]), float(found["one"])) == pytest.approx((share, 1))
    with as_users_do():
        q = of_means()
        assert fb.solve(problem, q.data, fb.Lockstep(), q.x, q.y, 3, key=jax.random.key(0)).iteration == 3


def test_check_problem_passes_where_a_client_lacks_a_group():
    assert fb.testing.check_problem(*GIVEN).passed


@pytest.mark.slow
def test_check_problem_finds_means_that_are_none():
    worst = lambda x, y, rows, weights: {"most": jnp.max(rows["t"] * y["b"])}
    problem = fb.Problem(
        lambda x, y, rows, weights: jnp.sum(weights * jax.vmap(lambda row: inner(x, y, row))(rows)),
        batched=True, outer_means=worst, outer_of=lambda m: m["most"] ** 2,
    )  # fmt: skip
    with pytest.raises(fb.testing.CheckFailed, match="FAILED client 0: outer weights"):
        fb.testing.check_problem(problem, Q.data, Q.x, Q.y | {"b": jnp.asarray(0.5)})


# Bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"outer_means": outer_means}, r"needs both outer_means= .* and outer_of="),
        ({"outer_of": outer_of}, r"needs both outer_means= .* and outer_of="),
        ({"outer_means": outer_means, "outer_of": 3}, r"needs both .*and 3\."),
        ({"outer": lambda x, y, row: 0.0, "outer_means": outer_means, "outer_of": outer_of}, r"one of the two"),
        ({}, r"Problem\(outer=...\) takes a function"),
    ],
)
def test_what_cannot_be_a_problem(given, words):
    with pytest.raises(fb.InputError, match=words):
        fb.Problem(inner, **given)


class Own(fb.Problem):
    def outer_value(self, x, y, rows):
        return jnp.sum(y["w"])


def test_oracles_of_ones_own_are_refused():
    with pytest.raises(
        fb.InputError, match="Own brings oracles of its own, and outer_means= needs those that are derived"
    ):
        Own(inner, outer_means=outer_means, outer_of=outer_of)


@pytest.mark.parametrize(
    ("means", "of", "words"),
    [
        (lambda x, y, row: {}, outer_of, r"outer_means must return a pytree of real numbers or arrays"),
        (
            lambda x, y, row: {"a": jax.lax.complex(row["t"], row["t"])},
            outer_of,
            r"outer_means must return a pytree of real numbers",
        ),
        (
            outer_means,
            lambda m: m["below"],
            r"outer_of must return a floating-point scalar for the means; it returned",
        ),
        (outer_means, lambda m: m["other"], r"outer_of of the means failed on .*KeyError.*other"),
        (lambda x, y, row: row["none"], outer_of, r"function outer_means failed on .*none"),
    ],
)
def test_what_means_cannot_be(means, of, words):
    problem = fb.Problem(inner, outer_means=means, outer_of=of)
    with pytest.raises(fb.InputError, match=words):
        fb.solve(problem, Q.data, fb.Lockstep(), Q.x, Q.y, 1, key=jax.random.key(0))


def test_a_group_with_no_rows_is_named():
    outer = [rows | {"member": np.repeat([[1.0, 0.0]], len(rows["t"]), 0)} for rows in Q.outer]
    data = fb.FederatedData.stack(Q.inner, outer)
    go = lambda check: fb.solve(Q.problem, data, fb.Lockstep(), Q.x, Q.y, 1, key=jax.random.key(0), check=check)
    zero = r"no finite value.*: means\['above'\]\[1\], means\['below'\]\[1\] are zero over all"
    with pytest.raises(fb.InputError, match=zero):
        go(True)
    with pytest.raises(fb.Diverged):
        go(False)


def test_a_group_that_few_have_is_no_reason_to_refuse():
    """The look at a few rows first finds none of it."""
    draw = np.random.default_rng(0)
    rows = lambda n, second: {
        "a": draw.normal(size=(n, 3)), "t": draw.normal(size=n),
        "member": np.eye(2)[[0] * (n - second) + [1] * second],
    }  # fmt: skip
    many = [rows(2000, 1), rows(2000, 0)]
    data = fb.FederatedData.stack([rows(5, 2), rows(5, 2)], many)
    end = fb.solve(Q.problem, data, fb.Lockstep(), Q.x, Q.y, 2, key=jax.random.key(0))
    assert end.iteration == 2


def test_losses_that_read_no_y_are_refused():
    problem = fb.Problem(inner, outer_means=lambda x, y, row: {"a": row["t"] * x["k"]}, outer_of=lambda m: m["a"] ** 2)
    with pytest.raises(fb.InputError, match="the outer loss does not depend on y"):
        fb.solve(problem, Q.data, fb.Lockstep(), Q.x, Q.y, 1, key=jax.random.key(0))
