"""The command line, as a person uses it: exit codes, sentences, files, resuming."""

import gzip
import json

import numpy as np
import pandas
import pytest

from fedbilevel.results.report import FIXED

SMALL = ["--dataset", "diabetes", "--clients", "4", "--iterations", "4", "--set", "inner_rounds=2"]


def history(folder):
    return pandas.read_csv(folder / "history.csv")


def test_a_run_leaves_everything_behind(fedbilevel, tmp_path):
    out = tmp_path / "run"
    code, text, _ = fedbilevel("run", "ridge", *SMALL, "--out", out)
    assert code == 0
    assert "test error" in text
    frame = history(out)
    assert tuple(frame.columns[: len(FIXED)]) == FIXED
    assert frame["iteration"].tolist() == [0, 1, 2, 3, 4]
    assert frame["rounds"].tolist() == [0, 8, 15, 22, 29]  # one round at the start measures the steps
    config = json.loads((out / "config.json").read_text())
    assert config["algorithms"]["aggitd"]["inner_rounds"] == 2
    assert config["clients_an_exchange"] == 4
    for name in ("summary.csv", "summary.md", "test_error.png", "stationarity.png"):
        assert (out / name).stat().st_size > 0


def test_compare_json_and_a_setting_for_one_algorithm(fedbilevel, tmp_path):
    out = tmp_path / "both"
    words = ["--algorithms", "aggitd,fednest", "--seeds", "2", "--set", "fednest.hessian_lr=0.02", "--json"]
    code, text, _ = fedbilevel("compare", "ridge", *SMALL, *words, "--out", out)
    assert code == 0
    assert {row["algorithm"] for row in json.loads(text)} == {"aggitd", "fednest"}
    algorithms = json.loads((out / "config.json").read_text())["algorithms"]
    assert algorithms["fednest"]["hessian_lr"] == 0.02
    assert algorithms["aggitd"]["hessian_lr"] == "auto"
    frame = history(out)
    assert set(zip(frame["algorithm"], frame["seed"], strict=True)) == {
        (a, s) for a in ("aggitd", "fednest") for s in (0, 1)
    }
    start = frame[frame["iteration"] == 0].set_index(["seed", "algorithm"])["test_error"]
    assert start[0, "aggitd"] == start[0, "fednest"]
    (out / "test_error.png").unlink()
    assert fedbilevel("plot", out)[0] == 0
    assert (out / "test_error.png").exists()


def test_resuming_gives_the_uninterrupted_numbers(fedbilevel, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = [
        "run",
        "ridge",
        "--dataset",
        "diabetes",
        "--clients",
        "4",
        "--set",
        "inner_rounds=2",
        "--set",
        "batch_size=5",
    ]
    assert fedbilevel(*words, "--iterations", 6, "--out", whole)[0] == 0
    assert fedbilevel(*words, "--iterations", 2, "--out", parts)[0] == 0
    assert len(history(parts)) == 3
    assert fedbilevel(*words, "--iterations", 6, "--out", parts, "--resume")[0] == 0
    drop = lambda frame: frame.drop(columns="seconds")
    pandas.testing.assert_frame_equal(drop(history(whole)), drop(history(parts)), check_exact=True)
    code, _, error = fedbilevel(*words, "--set", "inner_lr=0.2", "--iterations", 6, "--out", parts, "--resume")
    assert code == 2
    assert "inner_lr was 'auto' and is 0.2" in error


def test_loss_tuning_runs_on_label_shards(fedbilevel, tmp_path):
    out = tmp_path / "run"
    words = "run loss-tuning --dataset digits --partition shards --iterations 3 --evaluate-every 3 --out"
    assert fedbilevel(*words.split(), out)[0] == 0
    frame = history(out)
    metrics = ["test_accuracy", "balanced_accuracy", "test_loss", "validation_loss"]
    assert list(frame.columns[len(FIXED) :][:4]) == metrics
    assert frame["rounds"].tolist() == [0, 39]
    assert frame["validation_loss"][1] < frame["validation_loss"][0]


def test_protocol_as_table_and_json(fedbilevel):
    code, text, _ = fedbilevel("protocol", "ridge", "--algorithm", "aggitd", "--set", "inner_rounds=5", "--json")
    assert code == 0
    assert json.loads(text)["rounds"] == 13
    assert {"bytes_down", "bytes_up"} <= set(json.loads(text))
    code, text, _ = fedbilevel("protocol", "quadratic", "--algorithm", "fednest", "--set", "truncation=full")
    *_, total, start, beside = text.strip().splitlines()
    assert total.split()[:2] == ["total", "18"]
    assert "measuring, 1 round at the start" in start and "no round" in beside


def test_a_run_that_blows_up_exits_with_1_and_keeps_what_there_was(fedbilevel, tmp_path):
    out = tmp_path / "blown"
    code, _, error = fedbilevel("run", "quadratic", "--iterations", 60, "--set", "inner_lr=5", "--out", out)
    assert code == 1
    assert "lower inner_lr (now 5)" in error
    assert "Traceback" not in error
    assert np.isfinite(history(out)[["rounds", "seconds"]].to_numpy()).all()
    assert len(history(out)) >= 1


def test_list_names_everything(fedbilevel):
    code, text, _ = fedbilevel("list")
    assert code == 0
    for name in ("hyper-representation", "loss-tuning", "lfednest-svrg", "dirichlet", "loopback"):
        assert name in text


def idx_folder(tmp_path, images: bytes):
    labels = bytes([0, 0, 8, 1, 0, 0, 0, 2, 0, 1])
    for stem in ("train", "t10k"):
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (tmp_path / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("run rigde", "did you mean 'ridge'"),
        ("run ridge --algorithm agitd", "did you mean 'aggitd'"),
        ("run ridge --dataset digit", "did you mean 'digits'"),
        ("run ridge --partition shard", "did you mean 'shards'"),
        ("run ridge --engine simulator", "did you mean 'simulation'"),
        ("run ridge --set inner_round=3", "did you mean 'inner_rounds'"),
        ("run ridge --set fedavg.inner_lr=3", "fedavg"),
        ("run ridge --set inner_lr", "name=value"),
        ("run ridge --set inner_lr=fast", "takes a number"),
        ("run ridge --set inner_lr=-1", "positive number or 'auto'; got -1.0"),
        ("run ridge --set hessian_lr=nan", "positive number or 'auto'; got nan"),
        ("run ridge --set inner_rounds=0", "at least 1; got 0"),
        ("run ridge --set truncation=9", "lies in 0..5; got 9"),
        ("run ridge --set truncation=half", "'uniform', 'full' or a whole number"),
        ("run ridge --cohort 21", "a cohort of 21 cannot be drawn from 20 clients"),
        ("run ridge --cohort 0", "at least 1; got 0"),
        ("run ridge --clients 100000", "too few for 100000 clients"),
        ("run ridge --clients 0", "at least 1; got 0"),
        ("run ridge --iterations 0", "at least 1; got 0"),
        ("run ridge --iterations 2 --rounds 2", "not both"),
        ("run ridge --rounds 3", "3 rounds are too few"),
        ("run ridge --dataset mnist --data-dir /no/such/folder", "/no/such/folder"),
        ("run ridge --resume", "go with --out"),
        ("run ridge --precision 16", "32 or 64; got 16"),
        ("run ridge --clients many", "--clients"),
        ("run hyper-representation --model resnet", "'resnet'"),
        ("run ridge --model mlp", "no models to choose from"),
        ("run quadratic --partition shards", "makes its own clients"),
        ("compare ridge --algorithms ,", "separated by commas"),
        ("compare ridge --algorithms aggitd,aggitd", "twice"),
        ("compare ridge --seeds 0", "at least 1; got 0"),
        ("check fednets", "did you mean 'fednest'"),
        ("plot /no/such/folder", "no folder /no/such/folder"),
        ("run ridge --fast", "--fast"),
        ("rum ridge", "rum"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_code_2(fedbilevel, words, says):
    code, text, error = fedbilevel(*words.split())
    assert code == 2
    assert says in error
    assert text == ""
    assert len(error.strip().splitlines()) == 1


def test_an_output_folder_in_use_is_left_alone(fedbilevel, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    code, _, error = fedbilevel("run", "quadratic", "--iterations", 1, "--out", tmp_path)
    assert (code, (tmp_path / "mine.txt").read_text()) == (2, "precious")
    assert "not empty" in error
    code, _, error = fedbilevel("run", "quadratic", "--iterations", 1, "--out", tmp_path, "--overwrite")
    assert (code, (tmp_path / "mine.txt").read_text()) == (2, "precious")
    assert "no results of ours" in error
    assert fedbilevel("run", "quadratic", "--rounds", 2, "--out", tmp_path / "new")[0] == 2
    assert not any((tmp_path / "new").iterdir())  # the corrected command finds nothing in its way


@pytest.mark.parametrize(
    "images", [b"no images at all", bytes([0, 0, 8, 3, 0, 0, 0, 2, 255, 255, 255, 255, 0, 0, 0, 1, 7])]
)
def test_files_that_are_no_idx_files(fedbilevel, tmp_path, images):
    code, _, error = fedbilevel("run", "ridge", "--dataset", "mnist", "--data-dir", idx_folder(tmp_path, images))
    assert code == 2
    assert "train-images-idx3-ubyte.gz" in error
    assert len(error.strip().splitlines()) == 1


def test_clients_states_on_disk(fedbilevel, tmp_path):
    """A word for the simulation alone, which changes no number."""
    words = ["run", "quadratic", "--algorithm", "lockstep", "--clients", 3, "--iterations", 2, "--json"]
    rows = [json.loads(fedbilevel(*words, *more)[1]) for more in ([], ["--client-state", tmp_path])]
    drop = lambda row: {name: value for name, value in row.items() if "seconds" not in name}
    assert [drop(row) for row in rows[0]] == [drop(row) for row in rows[1]]
    code, _, error = fedbilevel(*words, "--client-state", "dsik")
    assert code == 2
    assert "a folder that exists; got 'dsik'" in error
    code, _, error = fedbilevel(*words, "--client-state", "disk", "--engine", "loopback")
    assert code == 2
    assert "--client-state is for --engine simulation" in error


@pytest.mark.parametrize(
    ("task", "algorithm"), [("quadratic", "AggITD"), ("cleaning", "Lockstep"), ("personal", "Lockstep")]
)
def test_a_task_has_an_algorithm_of_its_own(fedbilevel, task, algorithm):
    code, out, errors = fedbilevel("protocol", task, "--clients", "3", "--json")
    assert code == 0 and json.loads(out)["algorithm"] == algorithm, errors
