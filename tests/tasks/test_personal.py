"""Personal heads: both objectives and the metrics in numpy, the hypergradient, and that what is personal helps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import fedbilevel as fb
from fedbilevel.datasets import digits
from fedbilevel.errors import InputError
from fedbilevel.tasks import personal
from fedbilevel.tasks.base import Options
from fedbilevel.tasks.personal import WIDTH, build, inner_loss, outer_loss
from helpers.differences import check_hypergradient, moved


@pytest.fixture(autouse=True)
def promotion():
    """Rows are float32, the variables here float64."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def said(y, client, a):
    """Logits of one client's head, in numpy."""
    phi = np.maximum(np.asarray(a, float) @ np.asarray(y["body"]["weight"]) + np.asarray(y["body"]["bias"]), 0)
    return phi @ np.asarray(y["head"]["weight"][client]) + np.asarray(y["head"]["bias"][client])


def losses(y, level, client):
    rows = level.alone(client).rows
    labels = np.asarray(rows["label"])
    return -log_softmax(said(y, client, rows["a"]), axis=1)[np.arange(len(labels)), labels]


def test_labels_are_dealt_in_shards_unless_one_says():
    data = personal(seed=1).data
    few = [len(set(np.asarray(data.inner.alone(i).rows["label"]))) for i in range(20)]
    assert data.clients == 20 and max(few) <= 4
    assert len(set(np.asarray(personal(seed=1, partition="iid").data.inner.alone(0).rows["label"]))) > 7
    assert data.count("outer").sum() == pytest.approx(0.3 * len(digits().y_train), abs=10)


def test_heads_are_blocks_and_begin_alike():
    task = personal(seed=1, clients=7)
    assert task.x["head"].shape == (7,) and task.x["body"].shape == ()
    assert task.y["head"]["weight"].shape == (7, WIDTH, 10) and task.y["body"]["weight"].shape == (64, WIDTH)
    assert all((block == task.y["head"]["weight"][0]).all() for block in task.y["head"]["weight"].blocks)
    assert build(Options("digits", clients=3), width=4).y["head"]["weight"].shape == (3, 4, 10)


def test_the_objectives():
    task = personal(seed=1, clients=5)
    x, y = moved(task.x), moved(task.y)
    means = [[losses(y, level, i).mean() for i in range(5)] for level in (task.data.inner, task.data.outer)]
    outer = float(fb.reference.outer_value(task.problem, task.data, x, y))
    assert outer == pytest.approx(np.mean(means[1]), rel=1e-6)
    assert float(task.metrics["validation_loss"](x, y)) == pytest.approx(outer, rel=1e-12)
    size = lambda layer, *one: sum(np.sum(np.asarray(leaf[one] if one else leaf) ** 2) for leaf in layer.values())
    own = [np.exp(float(x["head"][i])) * sum(np.sum(np.asarray(leaf[i]) ** 2) for leaf in y["head"].values())
           for i in range(5)]  # fmt: skip
    penalty = 0.5 * (np.exp(float(x["body"])) * size(y["body"]) + np.mean(own))
    inner = float(fb.reference.inner_value(task.problem, task.data, x, y))
    assert inner == pytest.approx(np.mean(means[0]) + penalty, rel=1e-6)


def test_a_client_is_judged_by_its_own_labels_in_its_own_proportions():
    task, whole = personal(seed=1, clients=5), digits()
    y, accuracies, means = moved(task.y), [], []
    for client in range(5):
        levels = (task.data.inner, task.data.outer)
        counts = np.bincount(np.concatenate([level.alone(client).rows["label"] for level in levels]), minlength=10)
        logits = said(y, client, whole.x_test)
        each = -log_softmax(logits, axis=1)[np.arange(len(whole.y_test)), whole.y_test]
        right = logits.argmax(axis=1) == whole.y_test
        by_label = lambda values: np.array([values[whole.y_test == label].mean() for label in range(10)])
        accuracies.append(counts @ by_label(right) / counts.sum())
        means.append(counts @ by_label(each) / counts.sum())
    told = {name: float(task.metrics[name](task.x, y)) for name in ("test_accuracy", "worst_accuracy", "test_loss")}
    expected = {"test_accuracy": np.mean(accuracies), "worst_accuracy": min(accuracies), "test_loss": np.mean(means)}
    assert told == pytest.approx(expected, rel=1e-6)


def test_the_hypergradient_of_each_clients_penalty():
    """With the body held where it is: a body of ReLU has minima at kinks, where no derivative exists."""
    draw = np.random.default_rng(3)
    rows = lambda n: {"a": draw.normal(size=(n, 4)), "label": np.arange(n) % 3}
    data = fb.FederatedData.stack([rows(6), rows(5), rows(7)], [rows(4), rows(3), rows(5)])
    body, log = {"weight": jnp.asarray(draw.normal(size=(4, 2))), "bias": jnp.full(2, 0.5)}, jnp.asarray(-2.0)
    whole = lambda loss: lambda x, y, row: loss({"body": log, "head": x}, {"body": body, "head": y}, row)
    y = {"weight": fb.per_client(draw.normal(size=(3, 2, 3))), "bias": fb.per_client(np.zeros((3, 3)))}
    x = fb.per_client(np.array([-2.0, -1.5, -2.5]))
    check_hypergradient(fb.Problem(whole(inner_loss), whole(outer_loss)), data, x, y, least=1e-4)


def test_candidates_that_race_take_no_blocks():
    task = personal(clients=3)
    with pytest.raises(InputError, match=r"take no leaves per client .*: run one algorithm instead"):
        fb.tune(task.problem, task.data, task.x, task.y, rounds=50, key=task.key)


@pytest.mark.slow
def test_no_step_is_needed():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        task = personal(seed=0)
        how = {"rounds": 300, "key": task.key, "evaluate_every": 10**6, "metrics": task.metrics}
        result = fb.solve(task.problem, task.data, fb.Lockstep(), task.x, task.y, **how)
        trained = {name: result.history[-1][name] for name in ("test_accuracy", "worst_accuracy")}
        assert trained["test_accuracy"] > 0.94 and trained["worst_accuracy"] > 0.7
        assert result.history[-1]["test_accuracy"] > result.history[0]["test_accuracy"] + 0.5
