"""Group weights against a gap: the known gap, both objectives in numpy, the hypergradient, and groups that are too small."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.tasks import fair, fair_age
from fedbilevel.tasks.fair import GAP, LEAST, PENALTY, ROWS, SOFT, check_groups, draw, fair_problem, known_gap, thirds
from helpers import hospitals
from helpers.differences import check_hypergradient, moved
from helpers.places import DATA

LARGE = dict.fromkeys(hospitals.ROWS, 160)


@pytest.fixture(autouse=True)
def promotion():
    """Rows are float32, the variables here float64."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def task():
    with jax.numpy_dtype_promotion("standard"):
        return fair(seed=1)


def pooled(level, data):
    rows = [level.alone(i).rows for i in range(data.clients)]
    return {part: np.concatenate([np.asarray(each[part]) for each in rows]) for part in rows[0]}


def test_the_table(task):
    counts = task.data.count("inner") + task.data.count("outer")
    assert counts.sum() == ROWS and (counts.min(), counts.max()) == (1000, 3000)
    share = [np.mean(np.asarray(task.data.inner.alone(i).rows["group"])) for i in range(10)]
    assert share[0] < 0.04 and share[-1] > 0.34


def test_the_gap_is_known(task):
    """On as many rows as there are in the test: five deviations of a difference of two shares."""
    for seed in range(3):
        y = moved(task.y, seed)
        off = float(task.metrics["test_gap"](task.x, y)) - known_gap(y)
        assert abs(off) < 5 * np.sqrt(0.25 / (0.32 * ROWS) + 0.25 / (0.08 * ROWS))
    trained = fb.reference.solution(task.problem, task.data, task.x, task.y)
    assert known_gap(trained) == pytest.approx(0.18, abs=0.04)


def test_the_objectives(task):
    x, y = moved(task.x), moved(task.y)
    logit = lambda rows: np.asarray(rows["a"], float) @ np.asarray(y["weight"]) + float(y["bias"])
    loss = lambda rows: np.logaddexp(0, np.where(rows["label"] == 1, -logit(rows), logit(rows)))
    rows = pooled(task.data.inner, task.data)
    raised = np.exp(np.asarray(x))[rows["group"], rows["label"]]
    size = np.sum(np.asarray(y["weight"]) ** 2) + float(y["bias"]) ** 2
    inner = np.mean(raised / raised.mean() * loss(rows)) + 0.5 * PENALTY * size  # the weights' mean is one
    assert float(fb.reference.inner_value(task.problem, task.data, x, y)) == pytest.approx(inner, rel=1e-5)
    rows = pooled(task.data.outer, task.data)
    found = 1 / (1 + np.exp(-logit(rows) / SOFT))
    rate = lambda g: found[(rows["group"] == g) & (rows["label"] == 1)].mean()
    outer = loss(rows).mean() + GAP * (rate(0) - rate(1)) ** 2
    assert float(fb.reference.outer_value(task.problem, task.data, x, y)) == pytest.approx(outer, rel=1e-5)
    assert float(task.metrics["validation_loss"](x, y)) == pytest.approx(outer, rel=1e-5)


def test_the_hypergradient(tmp_path):
    made = fair_age(data_dir=hospitals.write(tmp_path, LARGE), seed=2)
    wide = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)
    check_hypergradient(made.problem, made.data, moved(wide(made.x)), wide(made.y), 1e-4)


def test_hospitals_keep_their_rows_and_every_cell_its_shares(tmp_path):
    made = fair(dataset="heart-disease", data_dir=hospitals.write(tmp_path, LARGE), seed=1)
    assert made.data.names == tuple(hospitals.ROWS)
    for level in (made.data.inner, made.data.outer):
        for i in range(4):
            np.testing.assert_array_equal(level.alone(i).rows["a"][:, 17:], np.eye(4)[[i] * int(level.counts[i])])
    other = fair(dataset="heart-disease", data_dir=tmp_path, seed=2)
    assert fb.testing.distance(made.data.outer.rows["a"], other.data.outer.rows["a"]) > 0.1
    cell = np.repeat([0, 1, 2, 3], [40, 20, 10, 3])
    inner, outer, test = thirds(np.random.default_rng(0), cell)
    assert sorted(np.concatenate([inner, outer, test])) == list(range(73))
    assert np.bincount(cell[test]).tolist() == [12, 6, 3, 1] and np.bincount(cell[outer]).tolist() == [18, 9, 4, 1]


def test_the_smaller_group_of_the_hospitals():
    """What the page says of it."""
    if not (DATA / "heart-disease").is_dir():
        pytest.skip("no folder with the hospitals' files")
    made = fair(dataset="heart-disease", data_dir=DATA, seed=0)
    rows = pooled(made.data.outer, made.data)
    assert np.sum((rows["group"] == 1) & (rows["label"] == 1)) == 21


def table(seed, positives):
    rows = draw(np.random.default_rng(seed), 400, 0.3)
    second = np.flatnonzero((rows["group"] == 1) & (rows["label"] == 1))
    rows["label"][second[positives:]] = 0
    return rows


def test_groups_that_are_too_small_are_refused():
    names, full = ("men", "women"), table(0, 1000)
    check_groups([full], [full], names)
    few = table(1, LEAST - 1)
    with pytest.raises(
        fb.InputError, match="the group 'women' has 19 positives in validation, and a true-positive rate over"
    ):
        check_groups([full], [few], names)
    none = {part: values[full["group"] == 0] for part, values in full.items()}
    with pytest.raises(fb.InputError, match="the group 'women' has 0 negative and 0 positive validation rows"):
        check_groups([full], [none], names)
    with pytest.raises(fb.InputError, match="the group 'women' has 0 negative and 0 positive training rows"):
        check_groups([none], [full], names)


def test_the_problem_of_rows_of_ones_own_is_the_tasks():
    task = fb.tasks.fair(seed=0)
    inner, outer = ([level.alone(i).rows for i in range(10)] for level in (task.data.inner, task.data.outer))
    problem, x, y = fair_problem(inner, outer, ("men", "women"))
    value, expected = (float(fb.reference.value(each, task.data, x, y)) for each in (problem, task.problem))
    assert value == expected
    assert fb.testing.distance((x, y), (task.x, task.y)) == 0
    odd = [*inner[:-1], {**inner[-1], "group": inner[-1]["group"] + 1}]
    with pytest.raises(fb.InputError, match="client 9's training rows have the group 2: it is 0 or 1"):
        fair_problem(odd, outer)
    named = fair_problem({f"bank {i}": rows for i, rows in enumerate(inner)}, outer)[1]
    assert named.shape == (2, 2)


def without(rows, part):
    return {name: values for name, values in rows.items() if name != part}


NONSENSE = {
    "no clients": (lambda full: ([], []), "training rows are a list of one dict a client"),
    "none": (lambda full: (None, None), "training rows are a list of one dict a client"),
    "numbers": (lambda full: ([1, 2], [3, 4]), "client 0's training rows are a dict of a, label and group"),
    "a part is missing": (lambda full: ([full], [without(full, "group")]), "client 0's validation rows .* no group"),
    "a short part": (lambda full: ([full | {"label": full["label"][:5]}], [full]), "parts of unlike lengths"),
    "short columns": (lambda full: ([full | {"a": full["a"][:5]}], [full]), "parts of unlike lengths"),
    "NaN": (lambda full: ([full | {"a": full["a"] * np.nan}], [full]), "of finite numbers"),
    "text": (lambda full: ([full | {"a": full["a"].astype(str)}], [full]), "of finite numbers"),
    "fewer at one level": (lambda full: ([full, full], [full]), "training rows of 2 clients and validation rows of 1"),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_rows_that_cannot_be_used_are_one_sentence(what):
    make, sentence = NONSENSE[what]
    with pytest.raises(fb.InputError, match=sentence):
        fair_problem(*make(table(0, 1000)))


@pytest.mark.parametrize("groups", [("a", "a"), "mw", ("a", "b", "c"), None])
def test_groups_are_two_names(groups):
    with pytest.raises(fb.InputError, match="groups= names two groups"):
        fair_problem([table(0, 1000)], [table(1, 1000)], groups)


def test_a_partition_is_refused(tmp_path):
    with pytest.raises(fb.InputError, match="fair task makes its own clients"):
        fair(partition="shards")
    with pytest.raises(fb.InputError, match="fair-age has 4 hospitals with their own rows"):
        fair_age(data_dir=hospitals.write(tmp_path, LARGE), clients=3)


@pytest.mark.slow
def test_the_gap_is_halved_with_no_step_given():
    with jax.enable_x64(False):
        task = fair(seed=11)
        end = fb.solve(task.problem, task.data, fb.Lockstep(), task.x, task.y, rounds=300, key=task.key)
        before, after = (fb.reference.solution(task.problem, task.data, at, task.y) for at in (task.x, end.x))
        gap = [abs(known_gap(y)) for y in (before, after)]
        assert gap[1] < 0.5 * gap[0]
        accuracy = [float(task.metrics["test_accuracy"](task.x, y)) for y in (before, after)]
        assert accuracy[1] > accuracy[0] - 0.02


@pytest.mark.slow
def test_cohorts_and_minibatches_find_it_too():
    """By a running mean of the means."""
    with jax.enable_x64(False):
        task, found = fair(seed=0), []
        algorithm = fb.AggITD(inner_rounds=3, truncation="full", batch_size=64)
        end = fb.solve(
            task.problem, task.data, algorithm, task.x, task.y, rounds=600, key=task.key,
            engine=fb.Simulation(cohort=4, dropout=0.2), evaluate_every=600,
        )  # fmt: skip
        for x in (task.x, end.x):
            y = fb.reference.solution(task.problem, task.data, x, task.y)
            found.append(float(fb.reference.outer_value(task.problem, task.data, x, y)))
        assert found[1] < found[0] - 0.09
