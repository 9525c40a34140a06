"""`fedbilevel tune`, as a person uses it."""

import json

import numpy as np
import pandas
import pytest

from fedbilevel.tune import kept
from helpers import apps

QUADRATIC = ["tune", "quadratic", "--clients", 3, "--rounds", 60]
TWO = [*QUADRATIC, "--candidates", 2]


def history(folder):
    return pandas.read_csv(folder / "history.csv").drop(columns="seconds")


def candidates(folder):
    return pandas.read_csv(folder / "candidates.csv")


def test_a_race_leaves_everything_behind(fedbilevel, tmp_path):
    out = tmp_path / "race"
    code, text, error = fedbilevel(*TWO, "--keep", "value:min", "--out", out)
    assert code == 0, error
    assert "chosen: " in text and "best: value" in text and "dropped after round" in text
    rows, told = history(out), json.loads((out / "outcome.json").read_text())
    assert set(rows["candidates"]) == {1, 2}
    table = candidates(out)
    assert list(table.columns) == ["name", "algorithm", "tempo", "score", "round", "why"]
    (gone,) = table["round"].dropna()
    assert rows["rounds"][rows["candidates"] == 2].max() <= gone < 60
    assert table["score"].notna().all()
    assert told["status"] == "done" and told["chosen"]["rounds"] == rows["rounds"].max() <= 60
    assert told["chosen"]["algorithm"] == table["algorithm"][table["round"].isna()].item()
    assert all(told["chosen"]["settings"][name] > 0 for name in ("inner_lr", "hessian_lr", "outer_lr"))
    with np.load(out / "variables.npz") as last, np.load(out / "best.npz") as best:
        assert last["x"].shape == best["x"].shape
        assert best["value"] == rows["value"].min()
    for name in ("summary.csv", "value.png", "checkpoint.eqx", "config.json"):
        assert (out / name).stat().st_size > 0
    assert not (out / "candidates.png").exists()

    code, _, error = fedbilevel(*TWO, "--keep", "value:min", "--out", out)
    assert code == 2 and "--resume to go on, or --overwrite" in error
    code, _, error = fedbilevel(
        *TWO[:-4], "--rounds", 70, "--candidates", 2, "--keep", "value:min", "--out", out, "--resume"
    )
    assert code == 2 and "tune.rounds was 60 and is 70" in error
    code, _, error = fedbilevel("run", "quadratic", "--clients", 3, "--rounds", 60, "--out", out, "--resume")
    assert code == 2 and "that is of a task, quadratic, tuned, and this of a task, quadratic" in error
    assert fedbilevel("plot", out)[0] == 0


def test_one_candidate_is_no_race(fedbilevel):
    code, text, _ = fedbilevel(*QUADRATIC[:-1], 20, "--candidates", 1, "--json")
    assert code == 0
    told = json.loads(text)
    assert told["chosen"]["rounds"] == told["last"]["rounds"] <= 20
    assert told["chosen"]["bytes_up"] == told["last"]["bytes_up"]
    (only,) = told["candidates"]
    assert (only["algorithm"], only["score"], only["round"]) == ("Lockstep", None, None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("quadratic", "--rounds"),
        ("quadratic --rounds many", "--rounds"),
        ("quadratic --rounds 0", "at least 1; got 0"),
        ("quadratic --rounds 1 --algorithms aggitd", "one iteration of AggITD takes"),
        ("quadratic --rounds 60 --max-bytes 10", "max_bytes=10 is too few"),
        ("quadratik --rounds 60", "did you mean 'quadratic'"),
        ("quadratic --rounds 60 --metric value", "--metric names a metric and its direction"),
        ("quadratic --rounds 60 --metric value:down", "direction"),
        ("quadratic --rounds 60 --metric valeu:min", "did you mean 'value'"),
        ("quadratic --rounds 60 --metric validation_loss:max", "validation_loss:min"),
        ("quadratic --rounds 60 --keep value", "as in 'test_loss:min'"),
        ("quadratic --rounds 60 --keep valeu:min", "did you mean 'value'"),
        ("quadratic --rounds 60 --candidates 0", "got 0"),
        ("quadratic --rounds 60 --candidates 99", "got 99"),
        ("quadratic --rounds 60 --cohort 99 --clients 3", "a cohort of 99 cannot be drawn from 3 clients"),
        ("quadratic --rounds 60 --batch-size 0", "batch_size"),
        ("quadratic --rounds 60 --algorithms agitd", "did you mean 'aggitd'"),
        ("quadratic --rounds 60 --algorithms lockstep,lockstep", "twice"),
        ("quadratic --rounds 60 --algorithms fedbioacc-local", "cannot race"),
        ("quadratic --rounds 60 --engine nvflare", "--engine nvflare is for an application"),
        ("quadratic --rounds 60 --poc", "--poc goes with --engine nvflare"),
        ("quadratic --rounds 60 --engine simulator", "did you mean 'simulation'"),
        ("quadratic --rounds 60 --resume", "go with --out"),
        ("quadratic --rounds 60 --precision 16", "32 or 64; got 16"),
        ("quadratic --rounds 60 --max-bytes 0", "at least 1; got 0"),
        ("no/app.py --rounds 60", "there is no file no/app.py"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_code_2(fedbilevel, words, says):
    code, text, error = fedbilevel("tune", *words.split())
    assert code == 2
    assert says in error
    assert text == ""
    assert len(error.strip().splitlines()) == 1


def test_what_cannot_run_leaves_nothing_behind(fedbilevel, tmp_path):
    out = tmp_path / "new"
    assert fedbilevel("tune", "quadratic", "--rounds", 60, "--candidates", 99, "--out", out)[0] == 2
    assert not any(out.iterdir())
    code, _, error = fedbilevel(*TWO, "--out", out, "--resume")
    assert code == 2 and "no run to resume" in error


class Stop(kept.Racing):
    """Ctrl-C, at an iteration."""

    at = 0

    def advance(self, run):
        super().advance(run)
        if run.iteration >= self.at:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(("at", "racing"), [(5, 2), (30, 1)])
def test_interrupted_it_keeps_the_leader_and_goes_on(fedbilevel, tmp_path, monkeypatch, at, racing):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = [*TWO, "--keep", "value:min", "--out"]
    assert fedbilevel(*words, whole)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "at", at)
        patch.setattr(kept, "Racing", Stop)
        code, _, error = fedbilevel(*words, parts)
    assert code == 1 and "--resume goes on" in error
    rows, told = history(parts), json.loads((parts / "outcome.json").read_text())
    assert (told["status"], told["iterations"]) == ("interrupted", rows["iteration"].max())
    assert told["best"]["value"] == rows["value"].min()
    assert candidates(parts)["round"].isna().sum() == racing
    with np.load(parts / "variables.npz") as last, np.load(parts / "best.npz") as best:
        assert last["x"].shape == best["x"].shape
    assert (parts / "value.png").exists()
    assert fedbilevel(*words, parts, "--resume")[0] == 0
    assert json.loads((parts / "outcome.json").read_text())["resumed_at"] == told["iterations"]
    pandas.testing.assert_frame_equal(history(whole), history(parts), check_exact=True)
    pandas.testing.assert_frame_equal(candidates(whole), candidates(parts), check_exact=True)
    for name in ("variables.npz", "best.npz"):
        with np.load(whole / name) as one, np.load(parts / name) as other:
            assert all(np.array_equal(one[k], other[k]) for k in one.files)


@pytest.mark.slow
def test_an_application_and_candidates_of_ones_own(fedbilevel, tmp_path):
    """Its own counts of work, steps found; over real messages the same race."""
    own = (
        "algorithm=fb.Lockstep(inner_lr=1e-9, local_steps=2), iterations=3, metrics={'size': lambda x, y: (x**2).sum()}"
    )
    file = apps.write(tmp_path, apps.CLOSED_FORM, own)
    words = ["tune", file, "--rounds", 60, "--algorithms", "lockstep,simfbo", "--metric", "size:max", "--json"]
    told = {}
    for engine in ("simulation", "loopback"):
        code, text, error = fedbilevel(*words, "--engine", engine, "--out", tmp_path / engine)
        assert code == 0, error
        told[engine] = json.loads(text)
    one, other = told["simulation"], told["loopback"]
    assert [each["algorithm"] for each in one["candidates"]] == ["Lockstep", "SimFBO"]
    assert [each["name"] for each in one["candidates"]] == ["lockstep", "simfbo"]
    assert all(
        each["score"] >= 0 for each in one["candidates"]
    )  # as the metric says it, though the highest is the best
    settings = one["chosen"]["settings"]
    assert settings["local_steps"] == 2 and settings["inner_lr"] > 1e-6
    assert one["chosen"]["rounds"] == other["chosen"]["rounds"]
    for mine, theirs in zip(one["candidates"], other["candidates"], strict=True):
        assert (mine["name"], mine["round"]) == (theirs["name"], theirs["round"])
        assert mine["score"] == pytest.approx(theirs["score"], rel=1e-9)


@pytest.mark.slow
def test_it_ends_before_its_bytes_are_spent(fedbilevel, tmp_path):
    code, text, error = fedbilevel(*QUADRATIC, "--precision", 64, "--max-bytes", 30_000, "--out", tmp_path / "few")
    assert code == 0, error
    rows = history(tmp_path / "few")
    assert (rows["bytes_down"] + rows["bytes_up"]).max() <= 30_000
    assert "Candidates" in text


@pytest.mark.slow
def test_one_that_fails_exits_with_1_and_keeps_what_there_was(fedbilevel, tmp_path):
    nan = "algorithm=fb.Lockstep(), iterations=3, metrics={'size': lambda x, y: jnp.nan * x[0]}"
    file, out = apps.write(tmp_path, apps.CLOSED_FORM, nan), tmp_path / "failed"
    words = ["tune", file, "--rounds", 20, "--candidates", 1, "--keep", "size:min", "--out", out]
    code, text, error = fedbilevel(*words)
    assert code == 1
    assert "failed: tune, seed 0: keep='size:min' found no best" in error
    assert "chosen: Lockstep(" in text
    assert json.loads((out / "outcome.json").read_text())["status"] == "failed"
    assert len(candidates(out)) == 1 and (out / "variables.npz").exists() and not (out / "best.npz").exists()


@pytest.mark.slow
def test_what_is_left_may_keep_nothing_at_clients(fedbilevel):
    """Twice a race becomes a smaller one in which no client keeps anything."""
    code, text, error = fedbilevel("tune", "minimax", "--rounds", 80, "--json")
    assert code == 0, error
    assert len(json.loads(text)["candidates"]) == 4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--tune", "--tune goes with --rounds R"),
        ("--metric value:min", "--metric goes with --tune"),
        ("--batch-size 4", "--batch-size goes with --tune"),
        ("--tune --rounds 60 --metric value:down", "direction"),
        ("--tune --rounds 60 --metric valeu:min", "did you mean 'value'"),
        ("--tune --rounds 60 --metric validation_loss:max", "validation_loss:min"),
        ("--tune --rounds 60 --candidates 9", "at least 1 and at most 8; got 9"),
        ("--tune --rounds 60 --max-bytes 0", "at least 1; got 0"),
    ],
)
def test_a_job_that_tunes_is_refused_before_it_is_written(fedbilevel, tmp_path, words, says):
    settings = "algorithm=fb.Lockstep(), iterations=3, metrics={'value': lambda x, y: jnp.sum(x**2)}"
    file = apps.write(tmp_path, apps.CLOSED_FORM, settings)
    code, text, error = fedbilevel("deploy", file, "--out", tmp_path / "job", *words.split())
    assert code == 2 and says in error and text == ""
    assert not (tmp_path / "job").exists()


def test_a_job_that_tunes_says_how(fedbilevel, tmp_path):
    messages = pytest.importorskip("fedbilevel.engines.nvflare.messages")
    file = apps.write(tmp_path, apps.CLOSED_FORM, "algorithm=fb.Lockstep(), iterations=3")
    words = ("--tune", "--rounds", 60, "--batch-size", 4, "--metric", "validation_loss:min")
    assert fedbilevel("deploy", file, "--out", tmp_path / "job", *words)[0] == 0
    (server,) = (tmp_path / "job").glob("*/*/config/config_fed_server.json")
    (said,) = (part["args"] for part in json.loads(server.read_text())["components"] if part["id"] == "_server")
    assert said["settings"] == {"rounds": 60}
    told = messages.read(said["tuning"], messages.Asked, ValueError, "tuning")
    assert told == messages.Asked(batch_size=4)  # f is what is judged anyway
