"""The search for step sizes against runs one by one, and the store that it fills."""

import dataclasses
import json
import tomllib

import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel import reference
from fedbilevel.algorithms import ALGORITHMS
from fedbilevel.results.curves import running_median
from helpers import apps
from helpers.plain import plain

LOCKSTEP = plain(fb.Lockstep, local_steps=2)
SMALL = ("ridge", "--clients", 3, "--iterations", 2)


@pytest.fixture
def store(monkeypatch, tmp_path):
    file = tmp_path / "store" / "steps.toml"
    monkeypatch.setenv("FEDBILEVEL_STORE", str(file))
    return file


def described(seed=0, algorithm=LOCKSTEP, **how):
    return fb.tasks.quadratic(clients=3, seed=seed).describe(algorithm, **{"iterations": 6, **how})


def one_by_one(run, settings):
    """The score of a point by a run of its own."""
    own = dataclasses.replace(run.algorithm, **settings)
    taken = {"loss": lambda x, y: reference.outer_value(run.problem, run.data, x, y)}
    result = fb.solve(run.problem, run.data, own, *run.start, 6, key=run.key, metrics=taken)
    return running_median(result.history.column("loss"))[-1]


@pytest.mark.parametrize("algorithm", [LOCKSTEP, fb.Lockstep(local_steps=2)], ids=["numbers", "auto"])
def test_the_best_point_is_that_of_runs_one_by_one(algorithm):
    runs = [described(seed, algorithm) for seed in (0, 1)]
    grid = {"inner_lr": (0.05, 0.2), "outer_lr": (0.1, 0.3)}
    found = fb.tune.search(runs, grid, wider=0)
    assert [point for point, _ in found.tried] == fb.tune.points(grid)
    expected = [np.mean([one_by_one(run, point) for run in runs]) for point in fb.tune.points(grid)]
    np.testing.assert_allclose([score for _, score in found.tried], expected, rtol=1e-10)
    best = int(np.argmin(expected))
    assert found.settings == fb.tune.points(grid)[best] and found.score == found.tried[best][1]
    assert set(found.edge) == set(grid)  # both values of each are outermost


@pytest.mark.slow
def test_a_metric_that_is_to_rise_and_a_grid_that_goes_on():
    run = described()
    rising = {"an_accuracy": lambda x, y: -reference.outer_value(run.problem, run.data, x, y)}
    run = dataclasses.replace(run, metrics=rising)
    grid = {"outer_lr": (0.01, 0.03)}
    found = fb.tune.search([run], grid, metric="an_accuracy", wider=2)
    tried = [point["outer_lr"] for point, _ in found.tried]
    assert tried[:2] == [0.01, 0.03] and tried[2:] == [0.0949, 0.3]
    assert found.score == max(score for _, score in found.tried)


def test_points_that_blow_up_are_the_worst():
    found = fb.tune.search([described(iterations=40)], {"inner_lr": (0.1, 50.0)}, wider=0)
    assert found.settings == {"inner_lr": 0.1} and found.tried[1][1] == np.inf
    with pytest.raises(fb.RunError, match="every point of the grid of Lockstep blew up"):
        fb.tune.search([described(iterations=40)], {"inner_lr": (50.0, 90.0)}, wider=0)


@pytest.mark.parametrize(
    ("grid", "how", "sentence"),
    [
        ({"step": (0.1,)}, {}, "there is no step size of Lockstep 'step'"),
        ({"inner_lr": (0.1, -1.0)}, {}, "positive numbers"),
        ({"inner_lr": ()}, {}, "at least one"),
        ({}, {}, "the grid has no step size"),
        (None, {"metric": "valu"}, "did you mean 'value'"),
    ],
)
def test_a_search_that_cannot_be_is_refused(grid, how, sentence):
    with pytest.raises(fb.InputError, match=sentence):
        fb.tune.search([described()], grid, **how)


def test_what_is_found_is_kept_and_taken(fedbilevel, store, tmp_path):
    words = ("--algorithms", "lockstep", "--grid", "outer_lr=0.1,0.3", "--grid", "hessian_lr=0.1")
    code, text, errors = fedbilevel("search", *SMALL, *words, "--seeds", 1, "--out", tmp_path / "grid", "--json")
    assert code == 0, errors
    best = {row["algorithm"]: row for row in json.loads(text)}
    assert set(best) == {"lockstep"} and best["lockstep"]["hessian_lr"] == 0.1
    assert (tmp_path / "grid" / "grid.csv").read_text().startswith("algorithm,")
    kept = tomllib.loads(store.read_text())["ridge"]["digits"]
    for name, row in best.items():
        assert kept[name]["outer_lr"] == row["outer_lr"] and kept[name]["found"]["score"] == row["validation_loss"]
    code, text, errors = fedbilevel("compare", *SMALL, "--algorithms", "lockstep,fedf2sa", "--seeds", 1, "--out",
                                    tmp_path / "out", "--set", "lockstep.inner_lr=0.2")  # fmt: skip
    assert code == 0, errors
    assert "stored by search" in text and "auto" in text
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["steps"] == {"lockstep": "stored by search, inner_lr given", "fedf2sa": "auto"}
    assert config["algorithms"]["fedf2sa"]["outer_lr"] == "auto"
    assert config["algorithms"]["lockstep"]["outer_lr"] == kept["lockstep"]["outer_lr"]
    assert config["algorithms"]["lockstep"]["inner_lr"] == 0.2
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "step sizes" in summary and "stored by search, inner_lr given" in summary


def test_an_entry_is_replaced_and_others_stay(fedbilevel, store):
    store.parent.mkdir()
    store.write_text(
        "# mine\n[ridge.digits.lockstep]\nouter_lr = 7.0\n\n[quadratic.synthetic.aggitd]\ninner_lr = 0.5\n"
    )
    code, text, errors = fedbilevel("search", *SMALL, "--algorithms", "lockstep", "--grid", "outer_lr=0.1")
    assert code == 0 and f"kept in {store}" in text, errors
    assert store.read_text().startswith("# mine")
    kept = tomllib.loads(store.read_text())
    assert kept["ridge"]["digits"]["lockstep"]["outer_lr"] != 7.0 and kept["quadratic"]["synthetic"]["aggitd"]


@pytest.mark.slow
def test_of_an_application_other_algorithms_are_kept_by_its_file(fedbilevel, store, tmp_path):
    file = apps.write(tmp_path, apps.CLOSED_FORM, f"iterations=4, {apps.LOCKSTEP}")
    words = (
        "--algorithms",
        "lockstep,fedf2sa",
        "--grid",
        "outer_lr=0.05,0.1",
        "--grid",
        "hessian_lr=0.1",
        "--seeds",
        1,
    )
    code, text, errors = fedbilevel("search", file, *words)
    assert code == 0 and "lockstep: the application's own algorithm" in text, errors
    assert list(tomllib.loads(store.read_text())["closed-form"]) == [str(file)]
    code, text, errors = fedbilevel("run", file, "--algorithm", "fedf2sa", "--out", tmp_path / "out")
    assert code == 0, errors
    assert json.loads((tmp_path / "out" / "config.json").read_text())["steps"] == {"fedf2sa": "stored by search"}
    other = apps.write(tmp_path, apps.CLOSED_FORM, f"iterations=4, {apps.LOCKSTEP}").rename(tmp_path / "other.py")
    assert fedbilevel("run", other, "--algorithm", "fedf2sa", "--out", tmp_path / "two")[0] == 0
    assert json.loads((tmp_path / "two" / "config.json").read_text())["steps"] == {"fedf2sa": "auto"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[ridge", "cannot be read"),
        ("ridge = 3", "has no sections [TASK.DATASET.ALGORITHM]"),
        ("[ridge.digits.aggitd]\nstep = 3.0", "aggitd, which has no such setting"),
        ("[ridge.digits.aggitd]\ninner_lr = -1.0", "positive number or 'auto'; got -1.0"),
        ("[ridge.digits]\naggitd = 1", "has no sections [TASK.DATASET.ALGORITHM]"),
    ],
)
def test_a_store_that_makes_no_sense_is_a_sentence(fedbilevel, store, text, sentence):
    store.parent.mkdir()
    store.write_text(text)
    code, _, errors = fedbilevel("run", *SMALL)
    assert code == 2 and sentence in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--grid", "outer_lr"), "--grid takes step=value"),
        (("--grid", "outer_lr=fast"), "--grid takes step=value"),
        (("--grid", "speed=1"), "has a step size 'speed'"),
        (("--seeds", 0), "at least 1; got 0"),
        (("--algorithms", "agitd"), "did you mean 'aggitd'"),
        (("--metric", "test_los"), "did you mean 'test_loss'"),
    ],
)
def test_bad_words_are_one_sentence(fedbilevel, store, words, sentence):
    code, text, errors = fedbilevel("search", *SMALL, *words)
    assert code == 2 and sentence in errors and text == "" and not store.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lockstep", "aggitd", "fednest", "fedbioacc-local", "adafbio", "memfbo"])
def test_every_kind_of_algorithm_is_searched(name):
    run = described(algorithm=ALGORITHMS[name](), iterations=None, rounds=60)
    found = fb.tune.search([run], {"inner_lr": (0.05, 0.1), "outer_lr": (0.05, 0.1)}, wider=0)
    assert len(found.tried) == 4 and np.isfinite(found.score)
