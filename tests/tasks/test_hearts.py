"""Hospitals: what is theirs alone, both objectives in numpy, and the hypergradient."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.errors import InputError
from fedbilevel.tasks import hearts
from fedbilevel.tasks.hearts import OWN, SIZES
from fedbilevel.tasks.logistic import BIAS_PENALTY
from helpers import hospitals
from helpers.differences import check_hypergradient, moved
from helpers.places import DATA


@pytest.fixture(autouse=True)
def promotion():
    """Rows are float32, the variables here float64."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def made_up(tmp_path):
    return hearts(data_dir=hospitals.write(tmp_path), seed=1)


def test_rows_stay_at_their_hospital(made_up):
    data = made_up.data
    sizes = data.count("inner") + data.count("outer")
    assert sizes.tolist() == [3 * rows // 4 for rows in hospitals.ROWS.values()]
    for i in range(4):
        for level in (data.inner, data.outer):
            rows = level.alone(i).rows
            assert set(np.asarray(rows["hospital"])) == {i}
            np.testing.assert_array_equal(rows["a"][:, 17:], np.eye(4)[rows["hospital"]])


def test_the_objectives(made_up):
    task, x, y = made_up, moved(made_up.x), moved(made_up.y)
    share = np.exp(x["hospital"]) / np.sum(np.exp(x["hospital"]))

    def losses(level, client):
        rows = level.alone(client).rows
        logit = np.asarray(rows["a"], float) @ y["weight"] + y["bias"]
        return np.logaddexp(0, np.where(np.asarray(rows["label"]) == 1, -logit, logit))

    means = lambda level: np.array([losses(level, i).mean() for i in range(4)])
    outer = float(fb.reference.outer_value(task.problem, task.data, x, y))
    assert outer == pytest.approx(means(task.data.outer).mean(), rel=1e-6)
    each = np.repeat([*np.exp(np.asarray(x["penalty"])), OWN], SIZES)
    penalty = 0.5 * (each @ np.asarray(y["weight"]) ** 2 + BIAS_PENALTY * float(y["bias"]) ** 2)
    inner = float(fb.reference.inner_value(task.problem, task.data, x, y))
    assert inner == pytest.approx(share @ means(task.data.inner) + penalty, rel=1e-6)


def test_the_hypergradient(made_up):
    check_hypergradient(made_up.problem, made_up.data, moved(made_up.x), made_up.y, least=1e-5)


@pytest.mark.parametrize("given", [{"clients": 5}, {"partition": "shards"}, {"alpha": 1.0}])
def test_nobody_else_is_dealt_their_rows(tmp_path, given):
    with pytest.raises(InputError, match="4 hospitals with their own rows"):
        hearts(data_dir=hospitals.write(tmp_path), **given)


@pytest.mark.skipif(not (DATA / "heart-disease").is_dir(), reason="no folder with the hospitals' files")
def test_the_real_hospitals():
    task = hearts(data_dir=DATA)
    assert (task.data.count("inner") + task.data.count("outer")).tolist() == [227, 220, 92, 150]
    assert float(task.metrics["test_loss"](task.x, task.y)) == pytest.approx(np.log(2), rel=1e-6)
    trained = fb.reference.solution(task.problem, task.data, task.x, task.y)
    assert float(task.metrics["test_accuracy"](task.x, trained)) > 0.75
