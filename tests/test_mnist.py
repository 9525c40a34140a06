"""The main job at its real size: MNIST, two label shards a client, 10 of 100 clients, checked-in settings, three seeds."""

import subprocess
import sys

import pandas
import pytest

from helpers.places import DATA


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "mnist").is_dir(), reason="no folder with MNIST")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_aggitd_reaches_90_percent_within_250_rounds_and_holds_88(tmp_path, seed):
    words = "run hyper-representation --algorithm aggitd --dataset mnist --partition shards --clients 100 --cohort 10"
    command = [sys.executable, "-m", "fedbilevel", *words.split(), "--rounds", "400", "--seed", str(seed)]
    subprocess.run([*command, "--data-dir", str(DATA), "--out", str(tmp_path)], check=True)
    frame = pandas.read_csv(tmp_path / "history.csv")
    assert frame["rounds"].iloc[-1] == 400
    assert frame.loc[frame["test_accuracy"] >= 0.90, "rounds"].min() <= 250
    assert frame["test_accuracy"].tail(10).min() >= 0.88
