"""An application on sample data: run with other algorithms and settings, compared, its protocol printed."""

import json

import numpy as np
import pandas
import pytest

import fedbilevel as fb
from fedbilevel.app import load_app
from fedbilevel.sampled import Sampled
from helpers import apps

AUTO = dict.fromkeys(("inner_lr", "hessian_lr", "outer_lr"), "auto")

SITES = ("site-1", "site-2", "site-3")
OWN_ALGORITHM = """
    class Still(fb.Algorithm):
        inner_lr: float = fb.rate(0.1)

        def init(self, x, y):
            return fb.State(x, y)

        def step(self, fed, state):
            y = fed.average(self.move, state.x, state.y)
            return fb.State(state.x, y), ()

        def move(self, client, x, y):
            gradient = client.problem.inner_gradient(x, y, client.batch("inner", None))
            return y - self.inner_lr * gradient
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    metrics = 'metrics={"size": lambda x, y: jnp.sum(y**2)}'
    return apps.write(tmp_path_factory.mktemp("app"), apps.CLOSED_FORM, f"iterations=4, {metrics}, {apps.LOCKSTEP}")


def solved(file, algorithm, seed, **how):
    app = load_app(file)
    x, y = app.begin()
    key = fb.App.key.fget(app.with_(seed=seed))
    return fb.solve(app.problem, app.data([*SITES]), algorithm, x, y, 4, key=key, **how)


def test_another_algorithm_runs_with_the_same_counts_of_work(fedbilevel, file, tmp_path):
    words = ("--algorithm", "fednest", "--set", "hessian_lr=0.03", "--set", "neumann_terms=2")
    code, text, errors = fedbilevel("run", file, *words, "--out", tmp_path / "out", "--json")
    assert code == 0, errors
    assert json.loads(text)["iteration"] == 4
    algorithm = fb.FedNest(
        local_steps=2, hessian_lr=0.03, neumann_terms=2, inner_lr="auto", outer_lr="auto"
    )  # two local steps, as the app's Lockstep
    expected = solved(file, algorithm, 0)
    with np.load(tmp_path / "out" / "variables.npz") as kept:
        np.testing.assert_allclose(kept["x"], expected.x, rtol=0, atol=1e-13)
        np.testing.assert_allclose(kept["y"], expected.y, rtol=0, atol=1e-13)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["algorithms"]["fednest"]["local_steps"] == 2
    assert config["steps"] == {"fednest": "auto, hessian_lr given"}


def test_compared_its_own_algorithm_is_as_the_file_says(fedbilevel, file, tmp_path):
    words = ("--algorithms", "lockstep,simfbo", "--seeds", 2, "--cohort", 2, "--set", "simfbo.inner_lr=0.05")
    code, text, errors = fedbilevel("compare", file, *words, "--out", tmp_path / "out")
    assert code == 0, errors
    assert "the app's own" in text and "auto, inner_lr given" in text
    frame = pandas.read_csv(tmp_path / "out" / "history.csv")
    assert set(zip(frame["algorithm"], frame["seed"], strict=True)) == {
        (a, s) for a in ("lockstep", "simfbo") for s in (0, 1)
    }
    own = load_app(file).algorithm
    for name, algorithm in (
        ("lockstep", own),
        ("simfbo", fb.SimFBO(local_steps=2, inner_lr=0.05, hessian_lr="auto", outer_lr="auto")),
    ):
        expected = solved(file, algorithm, 1, engine=fb.Simulation(cohort=2))
        with np.load(tmp_path / "out" / "runs" / f"{name}-1" / "variables.npz") as kept:
            np.testing.assert_allclose(kept["y"], expected.y, rtol=0, atol=1e-13)


@pytest.mark.slow
def test_settings_of_its_own_algorithm_are_changed(fedbilevel, file, tmp_path):
    code, _, errors = fedbilevel("run", file, "--set", "inner_lr=0.05", "--seed", 3, "--out", tmp_path / "out")
    assert code == 0, errors
    algorithm = fb.Lockstep(inner_lr=0.05, hessian_lr=0.02, outer_lr=0.1, local_steps=2)
    with np.load(tmp_path / "out" / "variables.npz") as kept:
        np.testing.assert_allclose(kept["x"], solved(file, algorithm, 3).x, rtol=0, atol=1e-13)


def test_every_site_is_loaded_once(fedbilevel, tmp_path):
    text = apps.CLOSED_FORM.replace("k = int", "print('loading', site)\n        k = int")
    file = apps.write(tmp_path, text, f"iterations=1, {apps.LOCKSTEP}")
    words = ("--algorithms", "lockstep", "--seeds", 2, "--out", tmp_path / "out")
    code, printed, errors = fedbilevel("compare", file, *words)
    assert code == 0, errors
    assert [line for line in printed.splitlines() if "loading" in line] == [f"loading {site}" for site in SITES]


def test_its_protocol_is_printed(fedbilevel, file):
    app = load_app(file)
    x, y = app.begin()
    for words, algorithm, cohort in (
        ((), app.algorithm, None),
        (("--algorithm", "aggitd", "--set", "inner_rounds=2", "--cohort", 2), fb.AggITD(2, local_steps=2, **AUTO), 2),
    ):
        code, text, errors = fedbilevel("protocol", file, *words, "--json")
        assert code == 0, errors
        expected = fb.protocol(algorithm, app.problem, app.data([*SITES]), x, y, fb.Simulation(cohort=cohort))
        assert json.loads(text) == json.loads(expected.to_json())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("compare", "FILE", "--engine", "nvflare"), "compare runs in simulation"),
        (("compare", "FILE", "--algorithms", "lockstep,agitd"), "did you mean 'aggitd'"),
        (("compare", "FILE", "--dataset", "digits"), "--dataset is for tasks"),
        (("protocol", "FILE", "--clients", 0), "at least 1; got 0"),
        (("protocol", "FILE", "--precision", 64), "--precision is for tasks"),
        (("deploy", "ridge", "--out", "job"), "there is no file ridge"),
        (("run", "ridge", "--engine", "nvflare"), "--engine nvflare is for an application"),
    ],
)
def test_what_cannot_be_is_a_sentence(fedbilevel, file, words, sentence):
    code, text, errors = fedbilevel(*(file if word == "FILE" else word for word in words))
    assert code == 2 and sentence in errors and len(errors.splitlines()) == 1 and text == ""


def test_an_algorithm_of_its_own_goes_by_its_class(fedbilevel, tmp_path):
    text = apps.CLOSED_FORM.replace("    app = fb.App(", OWN_ALGORITHM + "\n    app = fb.App(")
    file = apps.write(tmp_path, text, "iterations=3, algorithm=Still()")
    code, printed, errors = fedbilevel("compare", file, "--algorithms", "still,lockstep", "--seeds", 1, "--json")
    assert code == 0, errors
    assert [row["algorithm"] for row in json.loads(printed)] == ["still", "lockstep"]
    assert Sampled(load_app(file), SITES).kinds(["still"])["still"].__name__ == "Still"
