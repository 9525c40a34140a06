"""Client weights: whose labels are wrong, the inner objective in numpy, the hypergradient, and who is found."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_softmax

import fedbilevel as fb
from fedbilevel.datasets import digits
from fedbilevel.tasks import client_weights
from fedbilevel.tasks.base import Options
from fedbilevel.tasks.client_weights import InnerLoss, another, outer_loss, weight_ratio, wrong_clients
from helpers.differences import check_hypergradient, moved


@pytest.fixture(autouse=True)
def promotion():
    """Rows are float32, the variables here float64."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("partition", ["iid", "quantity"])
def test_all_labels_of_a_third_of_the_clients_are_wrong_and_those_held_are_right(partition):
    task, whole = client_weights(seed=1, partition=partition, clients=8), digits()
    right = {row.tobytes(): label for row, label in zip(whole.x_train, whole.y_train, strict=True)}
    truth = lambda rows: np.array([right[row.tobytes()] for row in np.asarray(rows["a"])])
    bad = wrong_clients(Options("digits", seed=1), 8)
    assert bad.sum() == 3
    for client in range(8):
        inner, outer = (level.alone(client).rows for level in (task.data.inner, task.data.outer))
        np.testing.assert_array_equal(truth(outer), outer["label"])
        assert ((truth(inner) != np.asarray(inner["label"])) == bad[client]).all()
    assert task.data.count("outer").sum() == pytest.approx(0.1 * len(whole.y_train), abs=14)
    at_start = {name: float(metric(task.x, task.y)) for name, metric in task.metrics.items()}  # pyright: ignore[reportArgumentType]
    assert at_start["weight_ratio"] == 1
    assert at_start["test_loss"] == pytest.approx(np.log(10)) == at_start["validation_loss"]


def test_every_other_class_is_as_likely():
    labels = another(np.full(30_000, 3), 4, np.random.default_rng(0))
    counts = np.bincount(labels, minlength=4)
    assert counts[3] == 0 and np.abs(counts[:3] - 10_000).max() < 400


def test_the_ratio_is_of_the_best_of_the_bad_and_the_worst_of_the_good():
    x = np.array([-3.0, -1.0, 2.0, 1.0])
    ratio = weight_ratio(np.array([True, True, False, False]))(fb.per_client(x), None)
    assert float(ratio) == pytest.approx(expit(-1) / expit(1))  # pyright: ignore[reportArgumentType]


def tiny():
    """Three clients with a few rows of three classes."""
    draw = np.random.default_rng(3)
    rows = lambda n: {"a": draw.normal(size=(n, 2)), "label": np.arange(n) % 3}
    data = fb.FederatedData.stack([rows(4), rows(5), rows(7)], [rows(4), rows(3), rows(5)])
    y = {"weight": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
    return fb.Problem(InnerLoss(penalty=0.1), outer_loss), data, moved(fb.per_client(jnp.zeros(3))), y


def test_the_inner_objective():
    problem, data, x, y = tiny()
    y = moved(y)
    each = []
    for i in range(3):
        rows = data.inner.alone(i).rows
        logits = np.asarray(rows["a"]) @ np.asarray(y["weight"]) + np.asarray(y["bias"])
        loss = -log_softmax(logits, axis=1)[np.arange(len(rows["label"])), rows["label"]].mean()
        each.append(2 * expit(float(x[i])) * loss)
    expected = np.mean(each) + 0.05 * sum(np.sum(np.asarray(part) ** 2) for part in y.values())
    assert float(fb.reference.inner_value(problem, data, x, y)) == pytest.approx(expected, rel=1e-12)


def test_the_hypergradient_of_every_weight():
    check_hypergradient(*tiny(), least=1e-4)


@pytest.mark.slow
def test_bad_clients_are_found_and_no_step_is_needed():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        task = client_weights(seed=0)
        how = {"rounds": 300, "key": task.key, "evaluate_every": 10**6, "metrics": task.metrics}
        last = fb.solve(task.problem, task.data, fb.Lockstep(), task.x, task.y, **how).history[-1]
        told = {name: float(last[name]) for name in ("weight_ratio", "test_accuracy")}
        assert told["weight_ratio"] < 0.1 and told["test_accuracy"] > 0.94
