"""`result.evaluate`: how each client fares at the returned x and y, on any rows."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fedbilevel as fb
from fedbilevel.reference import outer_value
from fedbilevel.threefry import new_key
from helpers.quadratic import DX, DY, flat, inner, outer, quadratic

Q = quadratic(seed=3, clients=5)
WEIGHTED = fb.FederatedData.stack(Q.inner, Q.outer, "rows", names=list("abcde"))
STEPS = {"inner_lr": 0.02, "hessian_lr": 0.02, "outer_lr": 0.02}
low = lambda x, y, row: row["a"] @ ravel_pytree(y)[0] < row["b"]


LOCKSTEP = fb.Lockstep(**STEPS)


def solve(algorithm=LOCKSTEP, data=WEIGHTED, **options):
    return fb.solve(Q.problem, data, algorithm, Q.x, Q.y, 3, key=new_key(1), check=False, **options)


@pytest.fixture(scope="module")
def result():
    return solve()


def other_rows(seed=9):
    draw = np.random.default_rng(seed)
    some = lambda n: {
        "a": draw.normal(size=(n, DY)), "b": draw.normal(size=n), "C": draw.normal(size=(n, DX, DY)),
        "B": draw.normal(size=(n, DX, DY)), "c": draw.normal(size=(n, DY)),
    }  # fmt: skip
    return [some(n) for n in (3, 9, 4, 2, 6)]


@pytest.mark.parametrize("batch", [None, 2])
def test_on_other_rows_it_is_the_metric_by_hand(result, batch):
    rows = other_rows()
    table = result.evaluate(Q.problem, fb.FederatedData.stack(rows, rows), {"low": low}, client_batch=batch)
    expected = [(each["a"] @ flat(result.y) < each["b"]).mean() for each in rows]
    np.testing.assert_allclose(table.columns["low"], expected, rtol=1e-12)
    np.testing.assert_allclose([table.mean["low"], table.worst["low"]], [np.mean(expected), min(expected)], rtol=1e-12)
    assert table.rows == (3, 9, 4, 2, 6)


def test_without_metrics_it_is_the_losses(result):
    table = result.evaluate(Q.problem, WEIGHTED)
    assert list(table.columns) == ["inner_loss", "outer_loss"]
    for name, loss, levels in (("inner_loss", inner, Q.inner), ("outer_loss", outer, Q.outer)):
        means = [np.mean([loss(result.x, result.y, _row(rows, k)) for k in range(len(rows["a"]))]) for rows in levels]
        np.testing.assert_allclose(table.columns[name], means, rtol=1e-12)
        assert table.worst[name] == table.columns[name].max()
    np.testing.assert_allclose(
        table.mean["outer_loss"], outer_value(Q.problem, WEIGHTED, result.x, result.y), rtol=1e-12
    )
    assert table.to_dataframe().index.tolist() == list("abcde")


def _row(rows, k):
    return {name: leaf[k] for name, leaf in rows.items()}


def test_it_is_what_the_run_says_at_its_end():
    result = solve(client_metrics={"low": low})
    assert str(result.evaluate(Q.problem, WEIGHTED, {"low": low})) == str(result.clients)


@pytest.mark.parametrize("engine", [fb.Simulation(), fb.Loopback()], ids=["sim", "loop"])
def test_clients_with_a_y_of_their_own_are_taken_at_it(engine):
    result = solve(fb.FedBiOAccLocal(**STEPS), engine=engine, data=Q.data)
    table = result.evaluate(Q.problem, Q.data, {"mean": lambda x, y, row: row["a"] @ ravel_pytree(y)[0]})
    own = [jax.tree.map(lambda leaf, i=i: leaf[i], result.clients_y) for i in range(5)]
    expected = [(rows["a"] @ flat(y)).mean() for rows, y in zip(Q.outer, own, strict=True)]
    np.testing.assert_allclose(table.columns["mean"], expected, rtol=1e-12)
    assert np.ptp([flat(y) for y in own], axis=0).max() > 1e-3
    few = fb.FederatedData.stack(Q.inner[:3], Q.outer[:3])
    with pytest.raises(fb.InputError, match="each client has a y of its own, 5 in all, and the data has 3 clients"):
        result.evaluate(Q.problem, few)


def test_what_cannot_be_meant_is_refused(result):
    with pytest.raises(fb.InputError, match=r"problem is a fedbilevel.Problem; got FederatedData"):
        result.evaluate(WEIGHTED, Q.problem)
    with pytest.raises(fb.InputError, match="data is a FederatedData"):
        result.evaluate(Q.problem, Q.outer)
    with pytest.raises(fb.InputError, match="'odd' is not a finite number at a, b, c and 2 more: a row's number"):
        result.evaluate(Q.problem, WEIGHTED, {"odd": lambda x, y, row: row["b"] / 0 * 0})
    result = fb.Result(None, None, fb.History(), result.protocol, None, 0)
    with pytest.raises(fb.InputError, match="y stays at the sites, so that nothing can be evaluated here"):
        result.evaluate(Q.problem, WEIGHTED)
