"""Loss tuning: the outer objective is the class-balanced loss of all clients, and the hypergradient is its derivative."""

from __future__ import annotations

from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fedbilevel as fb
from fedbilevel.cohorts import sample_cohort
from fedbilevel.datasets import Dataset, digits
from fedbilevel.errors import InputError
from fedbilevel.partition import iid
from fedbilevel.tasks import loss_tuning
from fedbilevel.tasks.base import balanced_accuracy, class_weights, classification_metrics
from fedbilevel.tasks.loss_tuning import InnerLoss, clients_data, levels, outer_loss
from fedbilevel.tasks.network import layer
from helpers.places import DATA

KEY = jax.random.key(5)
SKEWED = [{"partition": "shards"}, {"partition": "dirichlet", "alpha": 0.1}]


@pytest.fixture(autouse=True)
def promotion():
    """Data sets are float32, the variables here float64."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def moved(tree, key=KEY):
    """The tree, a random step away."""
    flat, unravel = ravel_pytree(tree)
    return unravel(flat + 0.3 * jax.random.normal(key, flat.shape))


def rows_of(level, client=None):
    """A client's rows at a level in numpy, or everybody's."""
    start, stop = (0, None) if client is None else (level.offsets[client], level.offsets[client] + level.counts[client])
    return {name: np.asarray(leaf)[start:stop] for name, leaf in level.rows.items()}


def losses(y, rows, factor=1.0, shift=0.0):
    """Cross-entropy of each row, in numpy."""
    y = jax.tree.map(np.asarray, y)
    hidden = np.maximum(rows["a"].astype(float) @ y["body"]["weight"] + y["body"]["bias"], 0)
    logits = factor * (hidden @ y["head"]["weight"] + y["head"]["bias"]) + shift
    largest = logits.max(axis=1)
    total = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
    return total - logits[np.arange(len(logits)), rows["label"]]


def values_of(task, y):
    """(clients,) what each client returns for its outer loss."""
    value = jax.jit(lambda y, i: task.problem.outer_value(task.x, y, task.data.outer.client(i).all()))
    return np.array([value(y, i) for i in range(task.data.clients)])


@pytest.mark.parametrize("options", SKEWED, ids=["shards", "dirichlet"])
def test_the_outer_objective_is_the_class_balanced_loss(options):
    task = loss_tuning(dataset="digits", seed=1, **options)
    data, y = task.data, moved(task.y)
    everybody = rows_of(data.outer)
    clients = [rows_of(data.outer, i) for i in range(data.clients)]
    one_class = [i for i, rows in enumerate(clients) if len(set(rows["label"])) == 1]
    assert one_class and set(everybody["label"]) == set(range(10))
    ce = losses(y, everybody)
    balanced = np.mean([ce[everybody["label"] == c].mean() for c in range(10)])

    exact = {"rel": 1e-12, "abs": 0}
    assert fb.reference.outer_value(task.problem, data, task.x, y) == pytest.approx(balanced, **exact)
    assert task.metrics["validation_loss"](task.x, y) == pytest.approx(balanced, **exact)
    values = values_of(task, y)
    assert np.mean(values) == pytest.approx(balanced, **exact)

    # nothing else is: not the plain mean, not the mean of the clients' own weighted means
    assert abs(ce.mean() - balanced) > 0.01 * balanced
    share = np.array([len(rows["label"]) for rows in clients]) / len(ce)
    normalised = [np.average(losses(y, rows), weights=rows["weight"]) for rows in clients]
    assert abs(np.dot(share, normalised) - balanced) > 0.01 * balanced
    for i in one_class:  # there the weights are gone
        assert normalised[i] == pytest.approx(losses(y, clients[i]).mean(), **exact)


def test_the_mean_of_a_cohort_estimates_the_class_balanced_loss_without_bias():
    task = loss_tuning(dataset="digits", partition="dirichlet", alpha=0.1, clients=8, seed=1)
    data, y = task.data, moved(task.y)
    values = values_of(task, y)
    balanced = float(task.metrics["validation_loss"](task.x, y))
    keys = jax.random.split(KEY, 4000)
    cohorts = np.asarray(jax.vmap(lambda key: sample_cohort(key, 8, 3, data.weights))(keys))

    def gap(values):
        """Between the mean over many cohorts of three and the objective, in standard errors."""
        means = values[cohorts].mean(axis=1)
        return abs(means.mean() - balanced) / (means.std() / len(means) ** 0.5)

    counts = data.count("outer")
    assert gap(values) < 4 < gap(values / (8 * counts / counts.sum()))  # the clients' own scale is needed


def test_the_inner_objective_is_the_mean_over_clients():
    task = loss_tuning(dataset="digits", partition="dirichlet", alpha=0.1, seed=1)
    x, y = moved(task.x), moved(task.y)
    factor, shift = 1 / (1 + np.exp(-np.asarray(x["delta"]))), np.asarray(x["iota"])
    of = lambda i: losses(y, rows_of(task.data.inner, i), factor, shift).mean()
    expected = np.mean([of(i) for i in range(task.data.clients)]) + 0.0005 * np.sum(np.asarray(ravel_pytree(y)[0]) ** 2)
    assert fb.reference.inner_value(task.problem, task.data, x, y) == pytest.approx(expected, rel=1e-12)


def test_the_outer_loss_has_no_direct_part():
    task = loss_tuning(dataset="digits", partition="shards", seed=1)
    x, y = moved(task.x), moved(task.y)
    gradients = jax.jit(lambda i: task.problem.outer_gradients(x, y, task.data.outer.client(i).all()))
    for client in range(task.data.clients):
        d_x, d_y = gradients(client)
        assert not np.any(ravel_pytree(d_x)[0])
        assert np.any(ravel_pytree(d_y)[0])


def tiny():
    """Three clients, three classes, two features and three hidden units; with a minimum that lies off the kinks of ReLU."""
    draw = np.random.default_rng(16)
    labels = np.repeat([0, 1, 2], [24, 12, 6])
    a = np.array([[2.0, 0.0], [-1.0, 1.5], [-1.0, -1.5]])[labels] + 0.9 * draw.normal(size=(len(labels), 2))
    parts = [np.arange(0, 20), np.arange(20, 32), np.arange(32, 42)]
    data = clients_data(a, labels, *levels(labels, parts, KEY))
    x = {"delta": jnp.array([0.3, -0.2, 0.5]), "iota": jnp.array([0.2, 0.0, -0.4])}
    y = {"body": layer(KEY, 2, 3), "head": layer(jax.random.fold_in(KEY, 1), 3, 3)}
    return fb.Problem(InnerLoss(penalty=0.05), outer_loss), data, x, y


def test_the_hypergradient_is_the_derivative_of_the_balanced_loss_of_the_trained_network():
    problem, data, x, y = tiny()
    y = fb.reference.solution(problem, data, x, y)
    flat, unravel = ravel_pytree(x)
    phi = lambda flat: float(fb.reference.value(problem, data, unravel(flat), y))
    step = 1e-4 * np.eye(len(flat))
    differences = np.array([(phi(flat + e) - phi(flat - e)) / 2e-4 for e in step])
    h = ravel_pytree(fb.reference.hypergradient(problem, data, x, y))[0]
    assert np.abs(differences).min() > 1e-4  # of every factor and every shift
    np.testing.assert_allclose(h, differences, rtol=1e-5, atol=1e-8)
    with pytest.warns(fb.errors.FedbilevelWarning, match="no minimum of g"):
        elsewhere = ravel_pytree(fb.reference.hypergradient(problem, data, x, moved(y), solve_inner=False))[0]
    assert not np.allclose(elsewhere, differences, rtol=0.1)


@pytest.mark.parametrize("seed", range(30))
def test_every_class_has_a_validation_row(seed):
    labels = np.repeat([0, 1, 2], [150, 48, 2])  # a plain split would miss the last in 64 of 100 cases
    parts = iid(200, 20, jax.random.key(seed))
    inner, outer = levels(labels, parts, jax.random.key(seed))
    assert set(labels[np.concatenate(outer)]) == {0, 1, 2}
    for rows, train, held in zip(parts, inner, outer, strict=True):
        np.testing.assert_array_equal(np.sort(np.concatenate([train, held])), rows)
        assert 2 <= len(held) <= 3  # a fifth of ten rows, and one more where all three rare rows lie


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([[0, 1, 2], [3]], "client 1 has 1 row, and needs one for each level: use fewer clients"),
        ([[0, 2], [1, 3]], "no client can spare a validation row of class 2: use fewer clients"),
    ],
)
def test_levels_that_cannot_be_are_refused(parts, words):
    with pytest.raises(InputError, match=words):
        levels(np.array([0, 0, 1, 2]), [np.array(rows) for rows in parts], KEY)
    levels(np.array([0, 0, 1, 2]), [np.array([0, 1, 2, 3])], KEY)


@pytest.mark.parametrize("partition", ["iid", "shards", "dirichlet", "quantity"])
def test_digits_are_thinned_out_and_the_test_rows_are_not(partition):
    task = loss_tuning(dataset="digits", partition=partition, seed=3)
    inner, outer = task.data.inner, task.data.outer
    labels = np.concatenate([rows_of(level)["label"] for level in (inner, outer)])
    before = np.bincount(digits().y_train)
    most = [ceil(137 * 0.1 ** (c / 9)) for c in range(9)] + [14]
    assert np.bincount(labels).tolist() == np.minimum(before, most).tolist()
    assert sum(outer.counts) == pytest.approx(0.2 * len(labels), abs=len(outer.counts))
    assert task.data.clients == 20 and task.x["delta"].shape == task.x["iota"].shape == (10,)
    assert not np.any(ravel_pytree(task.x)[0])
    other = loss_tuning(dataset="digits", partition=partition, seed=4).data
    same = lambda a, b: np.array_equal(np.sort(a["a"].sum(1)), np.sort(b["a"].sum(1)))
    together = lambda data: {"a": np.concatenate([data.inner.rows["a"], data.outer.rows["a"]])}
    assert not same(together(task.data), together(other))


@pytest.mark.skipif(not (DATA / "mnist").is_dir(), reason="no folder with MNIST")
def test_mnist_keeps_14818_rows():
    data = loss_tuning(dataset="mnist", data_dir=DATA, partition="shards").data
    assert data.clients == 100
    labels = np.concatenate([rows_of(level)["label"] for level in (data.inner, data.outer)])
    assert len(labels) == 14_818
    shrunk = [ceil(6_000 * 0.01 ** (c / 9)) for c in range(1, 9)]
    assert np.bincount(labels).tolist() == [5_923, *shrunk, 61]  # all zeros; 61: FedNest's code rounds 60 + 2e-14 up


def test_accuracy_and_balanced_accuracy():
    labels = np.array([0, 0, 0, 2], np.int32)
    always_zero = np.eye(3, dtype=np.float32)[[0, 0, 0, 0]]
    data = Dataset("four", always_zero, labels, always_zero, labels, 3)  # no test row of class 1
    predict = lambda x, y, a: a
    assert classification_metrics(predict, data)["test_accuracy"](None, None) == 0.75
    assert balanced_accuracy(predict, data)(None, None) == 0.5
    np.testing.assert_allclose(class_weights(labels), [2 / 3, 2 / 3, 2 / 3, 2])
