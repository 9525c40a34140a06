"""Banks: what the rows are like, both objectives in numpy, and the hypergradient."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.errors import InputError
from fedbilevel.tasks import bank
from fedbilevel.tasks.bank import GROUPS, ROWS
from fedbilevel.tasks.logistic import BIAS_PENALTY
from helpers.differences import check_hypergradient, moved


@pytest.fixture(autouse=True)
def promotion():
    """Rows are float32, the variables here float64."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def losses(y, rows):
    """Cross-entropy of each row, in numpy."""
    logit = np.asarray(rows["a"], float) @ y["weight"] + y["bias"]
    return np.logaddexp(0, np.where(np.asarray(rows["label"]) == 1, -logit, logit))


@pytest.mark.parametrize("seed", range(5))
def test_the_rows(seed):
    data = bank(seed=seed).data
    inner, outer = data.inner.rows, data.outer.rows
    sizes = data.count("inner") + data.count("outer")
    assert sizes.tolist() == list(ROWS) and data.inner.rows["a"].shape[1] == 15
    labels = np.concatenate([inner["label"], outer["label"]])
    assert labels.sum() == round(0.06 * len(labels))
    assert 15 < outer["label"].sum() < 35  # two in five of 63
    assert np.asarray(data.weights) == pytest.approx(data.count("inner") / sum(data.count("inner")))
    centres = [np.asarray(data.inner.alone(i).rows["a"]).mean(0) for i in range(5)]
    assert min(np.abs(centres[i] - centres[j]).max() for i in range(5) for j in range(i)) > 0.3


def test_seeds_and_other_numbers_of_banks():
    one, again, other = bank(seed=1), bank(seed=1), bank(seed=2)
    np.testing.assert_array_equal(one.data.inner.rows["a"], again.data.inner.rows["a"])
    assert not np.array_equal(one.data.inner.rows["a"], other.data.inner.rows["a"])
    several = bank(clients=9).data
    sizes = several.count("inner") + several.count("outer")
    assert (sizes.min(), sizes.max()) == (51, 411) and (np.diff(sizes) > 0).all()
    assert bank(clients=1).data.clients == 1
    with pytest.raises(InputError, match="makes its own clients"):
        bank(partition="shards")


def test_the_objectives():
    task = bank(seed=1)
    x, y, data = moved(task.x), moved(task.y), task.data
    inner, outer = data.inner.rows, data.outer.rows
    ce, labels = losses(y, outer), np.asarray(outer["label"])
    balanced = np.mean([ce[labels == c].mean() for c in (0, 1)])
    assert float(fb.reference.outer_value(task.problem, data, x, y)) == pytest.approx(balanced, rel=1e-6)
    assert float(task.metrics["validation_loss"](x, y)) == pytest.approx(balanced, rel=1e-6)

    share, positives = 1 / (1 + np.exp(-np.asarray(x["class_weight"]))), np.mean(np.asarray(inner["label"]))
    weights = np.where(np.asarray(inner["label"]) == 1, share / positives, (1 - share) / (1 - positives))
    assert weights.mean() == pytest.approx(1, rel=1e-12) and weights.std() > 0.01
    of_columns = np.repeat(np.exp(np.asarray(x["penalty"])), GROUPS) @ np.asarray(y["weight"]) ** 2
    expected = np.mean(weights * losses(y, inner)) + 0.5 * (of_columns + BIAS_PENALTY * float(y["bias"]) ** 2)
    assert float(fb.reference.inner_value(task.problem, data, x, y)) == pytest.approx(expected, rel=1e-6)
    plain = np.mean(losses(y, inner)) + 0.5 * (
        np.sum(np.asarray(y["weight"]) ** 2) + BIAS_PENALTY * float(y["bias"]) ** 2
    )
    assert float(fb.reference.inner_value(task.problem, data, task.x, y)) == pytest.approx(plain, rel=1e-6)  # s = p


def test_the_hypergradient():
    task = bank(seed=2, clients=2)
    check_hypergradient(task.problem, task.data, moved(task.x), task.y, least=1e-4)


def test_test_rows_give_both_classes_the_same_say():
    task = bank(seed=1)
    assert float(task.metrics["balanced_accuracy"](task.x, task.y)) == pytest.approx(0.5)  # everybody negative
    assert float(task.metrics["test_loss"](task.x, task.y)) == pytest.approx(np.log(2), rel=1e-6)
    sure = {**task.y, "bias": task.y["bias"] - 10}  # 10 for each positive, nothing for a negative
    assert float(task.metrics["test_loss"](task.x, sure)) == pytest.approx(5, rel=1e-4)
