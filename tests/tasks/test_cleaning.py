"""Cleaning: which labels are wrong, weights whose mean is one, and the hypergradient of each of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_softmax

import fedbilevel as fb
from fedbilevel.datasets import digits
from fedbilevel.tasks import cleaning
from fedbilevel.tasks.cleaning import InnerLoss, found, outer_loss, replaced
from helpers.differences import check_hypergradient, moved


@pytest.fixture(autouse=True)
def promotion():
    """Rows are float32, the variables here float64."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("partition", ["iid", "shards", "quantity"])
def test_two_in_five_labels_are_wrong_and_those_held_are_right(partition):
    task, whole = cleaning(seed=1, partition=partition, clients=7), digits()
    inner, outer = task.data.inner.rows, task.data.outer.rows
    right = {row.tobytes(): label for row, label in zip(whole.x_train, whole.y_train, strict=True)}
    truth = lambda rows: np.array([right[row.tobytes()] for row in np.asarray(rows["a"])])
    np.testing.assert_array_equal(truth(outer), outer["label"])
    assert len(outer["label"]) == pytest.approx(0.1 * len(whole.y_train), abs=14)
    wrong = truth(inner) != np.asarray(inner["label"])
    assert wrong.sum() == round(0.4 * len(wrong)) and len(wrong) + len(outer["label"]) == len(whole.y_train)
    assert set(np.asarray(inner["label"])[wrong]) == set(range(10))  # any other class
    np.testing.assert_array_equal(np.sort(inner["number"]), np.arange(task.x.size))
    told = task.metrics["found"]
    place = np.asarray(inner["number"])
    assert float(told(task.x, task.y)) == pytest.approx(0.5)
    assert float(told(task.x.at[place].set(jnp.where(wrong, -1.0, 1.0)), task.y)) == pytest.approx(1)


def test_found_is_the_area_under_the_curve():
    from sklearn.metrics import roc_auc_score

    draw = np.random.default_rng(0)
    x, wrong = draw.integers(0, 5, 40).astype(float), draw.random(40) < 0.4  # with many ties
    assert float(found(wrong)(jnp.asarray(x), None)) == pytest.approx(roc_auc_score(wrong, -x))


def test_every_other_class_is_as_likely():
    labels, wrong = replaced(np.full(30_000, 3), 4, np.random.default_rng(0))
    assert wrong.sum() == 12_000 and (labels[~wrong] == 3).all()
    counts = np.bincount(labels[wrong], minlength=4)
    assert counts[3] == 0 and np.abs(counts[:3] - 4_000).max() < 250


def tiny():
    """Two clients with three and five training rows of three classes."""
    draw = np.random.default_rng(3)
    rows = lambda n, **more: {"a": draw.normal(size=(n, 2)), "label": np.arange(n) % 3, **more}
    data = fb.FederatedData.stack([rows(3, number=np.arange(3)), rows(5, number=np.arange(3, 8))], [rows(4), rows(3)])
    y = {"weight": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
    return fb.Problem(InnerLoss(penalty=0.1), outer_loss), data, moved(jnp.zeros(8)), y


def test_the_inner_objective():
    problem, data, x, y = tiny()
    y = moved(y)
    weights = expit(np.asarray(x)) / np.mean(expit(np.asarray(x)))
    assert weights.mean() == pytest.approx(1) and weights.std() > 0.1
    each, weight, bias = [], np.asarray(y["weight"]), np.asarray(y["bias"])
    for i in range(2):
        rows = data.inner.alone(i).rows
        ce = -log_softmax(np.asarray(rows["a"]) @ weight + bias, axis=1)[np.arange(len(rows["label"])), rows["label"]]
        each.append(np.mean(weights[np.asarray(rows["number"])] * ce))
    expected = np.mean(each) + 0.05 * sum(np.sum(np.asarray(part) ** 2) for part in y.values())
    assert float(fb.reference.inner_value(problem, data, x, y)) == pytest.approx(expected, rel=1e-12)


def test_the_hypergradient_of_every_weight():
    check_hypergradient(*tiny(), least=1e-6)
