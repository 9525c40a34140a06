"""Cleaning: which labels are wrong, whose weights are whose, the inner objective in numpy, what is found and left out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_softmax

import fedbilevel as fb
from fedbilevel.datasets import Dataset, Facts, digits
from fedbilevel.tasks import cleaning
from fedbilevel.tasks.base import Options
from fedbilevel.tasks.cleaning import InnerLoss, area, dealt, f1, flags, judged, outer_loss, replaced
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
    np.testing.assert_array_equal(
        np.concatenate(dealt(Options("digits", None, partition, 7, seed=1), whole).wrong), wrong
    )
    sizes = [len(block) for block in task.x.blocks]
    assert sizes == task.data.count("inner").tolist()
    np.testing.assert_array_equal(inner["place"], np.concatenate([np.arange(size) for size in sizes]))
    told = {name: float(task.metrics[name](task.x, task.y)) for name in ("found", "flagged", "never_asked")}
    assert told == {"found": 0.5, "flagged": 0, "never_asked": len(wrong)}
    ends = np.cumsum(sizes)[:-1]
    known = fb.per_client(np.split(np.where(wrong, -3.0, 1.0), ends))
    told = {name: float(task.metrics[name](known, task.y)) for name in ("found", "flagged", "never_asked")}
    assert told == {"found": 1, "flagged": 1, "never_asked": 0}


def test_of_more_rows_ten_thousand_are_taken():
    draw = np.random.default_rng(0)
    labels, a = draw.integers(0, 10, 12_000).astype(np.int32), np.zeros((12_000, 1), np.float32)
    whole = Dataset("made", a, labels, a, labels, 10, Facts("images", clients=100))
    rows = dealt(Options(partition="shards", seed=3), whole)
    every = np.concatenate([*rows.inner, *rows.outer])
    assert len(rows.inner) == 100 and len(every) == len(set(every)) == 10_000 and every.max() > 11_900
    assert max(len(set(whole.y_train[own])) for own in rows.outer) <= 4
    assert sum(map(len, rows.outer)) == 1_000
    truth = whole.y_train[np.concatenate(rows.inner)]
    np.testing.assert_array_equal(np.concatenate(rows.labels) != truth, np.concatenate(rows.wrong))


def test_found_is_the_area_under_the_curve():
    from sklearn.metrics import f1_score, roc_auc_score

    draw = np.random.default_rng(0)
    x, wrong = draw.integers(-3, 5, 40).astype(float), draw.random(40) < 0.4  # with many ties
    assert area(x, wrong) == pytest.approx(roc_auc_score(wrong, -x))
    said = 2 * expit(x) < np.median(2 * expit(x)) / 2
    np.testing.assert_array_equal(flags(x), said)
    assert said.any() and f1(said, wrong) == pytest.approx(f1_score(wrong, said))


def test_rows_that_were_never_asked_are_left_out_and_counted():
    """The second client's block is where it began; the third has one row that has not moved, and was asked."""
    wrong = [np.array([True, False]), np.array([True, True, True]), np.array([False, False])]
    x = fb.per_client([np.array([-9.0, 2.0]), np.zeros(3), np.array([1.0, 0.0])])
    told = {name: float(metric(x, None)) for name, metric in judged(wrong).items()}  # pyright: ignore[reportArgumentType]
    assert told == {"found": 1, "flagged": 1, "never_asked": 3}


def test_a_cohort_leaves_the_blocks_of_others():
    with jax.enable_x64(False):
        task = cleaning(seed=0, clients=30)
        run = fb.solve(
            task.problem, task.data, fb.Lockstep(inner_lr=0.1, hessian_lr=0.1, outer_lr=1.0), task.x, task.y,
            iterations=2, key=task.key, metrics=task.metrics, engine=fb.Simulation(cohort=3),
        )  # fmt: skip
    still = sum(len(block) for block in run.x.blocks if not np.any(block))
    assert 0 < still < task.data.count("inner").sum() and run.history[-1]["never_asked"] == still


def test_every_other_class_is_as_likely():
    labels, wrong = replaced(np.full(30_000, 3), 4, np.random.default_rng(0))
    assert wrong.sum() == 12_000 and (labels[~wrong] == 3).all()
    counts = np.bincount(labels[wrong], minlength=4)
    assert counts[3] == 0 and np.abs(counts[:3] - 4_000).max() < 250


def tiny():
    """Two clients with three and five training rows of three classes."""
    draw = np.random.default_rng(3)
    rows = lambda n: {"a": draw.normal(size=(n, 2)), "label": np.arange(n) % 3}
    placed = lambda n: {**rows(n), "place": np.arange(n)}
    data = fb.FederatedData.stack([placed(3), placed(5)], [rows(4), rows(3)])
    y = {"weight": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
    x = fb.per_client([draw.normal(size=3), draw.normal(size=5)])
    return fb.Problem(InnerLoss(jnp.asarray(0.1)), outer_loss), data, x, y


def test_the_inner_objective():
    problem, data, x, y = tiny()
    y = moved(y)
    each, weight, bias = [], np.asarray(y["weight"]), np.asarray(y["bias"])
    for i in range(2):
        rows = data.inner.alone(i).rows
        ce = -log_softmax(np.asarray(rows["a"]) @ weight + bias, axis=1)[np.arange(len(rows["label"])), rows["label"]]
        each.append(np.mean(2 * expit(x[i]) * ce))
    expected = np.mean(each) + 0.05 * sum(np.sum(np.asarray(part) ** 2) for part in y.values())
    assert float(fb.reference.inner_value(problem, data, x, y)) == pytest.approx(expected, rel=1e-12)


def test_the_hypergradient_of_every_weight():
    """As one array of equal blocks: differences move every entry, and the zeros that end a block are nobody's."""
    draw = np.random.default_rng(3)
    rows = lambda n: {"a": draw.normal(size=(n, 2)), "label": np.arange(n) % 3}
    placed = lambda n: {**rows(n), "place": np.arange(n)}
    data = fb.FederatedData.stack([placed(4), placed(4)], [rows(4), rows(3)])
    y = {"weight": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
    problem = fb.Problem(InnerLoss(jnp.asarray(0.1)), outer_loss)
    check_hypergradient(problem, data, moved(fb.per_client(jnp.zeros((2, 4)))), y, least=1e-6)


@pytest.mark.slow
def test_wrong_rows_are_found_and_no_step_is_needed():
    with jax.enable_x64(False):
        task = cleaning(seed=0)
        how = {"rounds": 300, "key": task.key, "evaluate_every": 10**6, "metrics": task.metrics}
        last = fb.solve(task.problem, task.data, fb.Lockstep(), task.x, task.y, **how).history[-1]
        assert last["found"] > 0.94 and last["flagged"] > 0.88 and last["never_asked"] == 0
