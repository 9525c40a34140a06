"""Folders of results: every verb that takes one takes those of tasks and of applications, of a run and of a comparison."""

import json
import shutil

import numpy as np
import pandas
import pytest

from fedbilevel.errors import InputError
from fedbilevel.results import folder as folders
from helpers import apps

TASK = ("ridge", "--clients", 3)
METRICS = 'metrics={"size": lambda x, y: jnp.sum(y**2)}'
KINDS = ["task", "task compared", "app", "app compared", "app of before"]


def words(kind, file, iterations=2):
    """The command that leaves a folder of a kind, but for --out."""
    what = TASK if kind.startswith("task") else (file,)
    many = ("--algorithms", "lockstep,fedf2sa", "--seeds", 2) if kind.endswith("compared") else ()
    verb = "compare" if many else "run"
    return (verb, *what, *(many or ("--algorithm", "lockstep")), "--iterations", iterations, "--set", "local_steps=1")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return apps.write(tmp_path_factory.mktemp("app"), apps.CLOSED_FORM, f"iterations=2, {METRICS}, {apps.LOCKSTEP}")


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """Folders by kind, once they are made."""
    return {}, tmp_path_factory.mktemp("templates")


@pytest.fixture
def made(fedbilevel, file, tmp_path, templates):
    """A folder of a kind: run once, and copied."""
    known, place = templates

    def make(kind, name="out"):
        if kind not in known:
            known[kind] = place / kind.replace(" ", "-")
            code, _, errors = fedbilevel(*words(kind, file), "--out", known[kind])
            assert code == 0, errors
        shutil.copytree(known[kind], tmp_path / name)
        if kind == "app of before":  # which left these alone
            for path in (tmp_path / name).iterdir():
                if path.name not in ("history.csv", "variables.npz", "checkpoint.eqx"):
                    path.unlink()
        return tmp_path / name

    return make


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if "compared" in kind else kind for kind in KINDS]
)
def test_every_verb_takes_every_folder(fedbilevel, made, file, kind):
    out = made(kind)
    code, text, errors = fedbilevel("plot", out)
    assert code == 0, errors
    assert "At the end" in text and (out / "summary.csv").is_file() and list(out.glob("*.png"))
    metric = "size" if kind.startswith("app") else "test_accuracy"
    goal = pandas.read_csv(out / "history.csv")[metric].max()
    asked = ("--cohort", 3) if kind == "app of before" else ()  # it has no config.json that says so
    cost = ("cost", out, "--latency", "1s", "--up", "1MB/s", "--down", "1MB/s", "--level", goal)
    code, text, errors = fedbilevel(*cost, *asked)
    assert code == 0 and (out / "cost.png").is_file(), errors
    code, _, errors = fedbilevel(*cost) if asked else (2, "", "--cohort")
    assert code == 2 and "--cohort" in errors
    code, _, errors = fedbilevel(*words(kind, file, 3), "--out", out, "--resume")
    assert code == 0, errors
    assert pandas.read_csv(out / "history.csv")["iteration"].max() == 3
    for more in ((), ("--overwrite",)):
        code, _, errors = fedbilevel(*words(kind, file), "--out", out, *more)
        assert code == (0 if more else 2) and ("--resume to go on" in errors or more)
    assert pandas.read_csv(out / "history.csv")["iteration"].max() == 2


@pytest.mark.parametrize(("there", "asked"), [(a, b) for a in KINDS[:4] for b in KINDS[:4] if a != b])
def test_another_kind_of_run_does_not_go_on_there(fedbilevel, made, file, there, asked):
    out = made(there)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, _, errors = fedbilevel(*words(asked, file), "--out", out, "--resume")
    assert code == 2 and len(errors.splitlines()) == 1
    of = {"task": "a task, ridge", "app": "an application, closed-form"}
    other = there.split()[0] != asked.split()[0]
    assert "nothing to resume" in errors or "holds another run" in errors
    assert "nothing" in errors or not other or f"that is of {of[there.split()[0]]}, and this of" in errors
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_run_leaves_its_variables_and_what_became_of_it(made):
    for kind, place, way in (("task", "runs/lockstep-0", "quick"), ("app", ".", "full")):  # the app has 64 bits
        run = made(kind, kind) / place
        said = json.loads((run / "outcome.json").read_text())
        assert said == {"status": "done", "iterations": 2, "compiled": way}
        assert {name[0] for name in np.load(run / "variables.npz")} == {"x", "y"}
        assert (run / "checkpoint.eqx").is_file() and (run / "history.csv").is_file()


def test_a_run_without_metrics_is_drawn_and_says_whose_steps_it_took(fedbilevel, tmp_path):
    plain = apps.write(tmp_path, apps.CLOSED_FORM, f"iterations=2, {apps.LOCKSTEP}")
    code, text, errors = fedbilevel("run", plain, "--out", tmp_path / "out")
    assert code == 0, errors
    assert (tmp_path / "out" / "hypergradient_norm.png").is_file() and "the app's own" in text
    code, text, _ = fedbilevel("run", plain, "--out", tmp_path / "out", "--overwrite", "--json")
    assert json.loads(text)["step_sizes"] == "the app's own"


def test_what_is_somebody_elses_stays(made):
    out = made("app compared")
    (out / "mine.png").write_text("precious")
    (out / "runs" / "lockstep-0" / "mine.txt").write_text("precious")
    folders.clear(out)
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        "mine.png",
        "runs/lockstep-0/mine.txt",
    }


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_configuration_that_cannot_be_read_is_a_sentence(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        folders.opened(tmp_path, {}, resume=True)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is a file"):
        folders.opened(tmp_path / "out", {})


def test_a_folder_that_was_moved_goes_on(fedbilevel, made, file, tmp_path):
    shutil.move(made("app"), tmp_path / "elsewhere")
    code, _, errors = fedbilevel(*words("app", file, 4), "--out", tmp_path / "elsewhere", "--resume")
    assert code == 0, errors
