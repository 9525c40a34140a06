"""The quick study, as the command line runs it."""

import jax
import pandas
import pytest

from fedbilevel_studies import catalogue, tuning


def test_it_is_listed():
    assert catalogue.names()["tuning"] == tuning.SUMMARY


@pytest.mark.slow
def test_the_quick_study(fedbilevel, tmp_path):
    words = "reproduce", "tuning", "--quick", "--out", str(tmp_path / "q")
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):  # as users have it
        code, _, errors = fedbilevel(*words)
    assert code == 0, errors
    frame = pandas.read_csv(tmp_path / "q" / "tuning.csv")
    ends = frame.groupby(["contender", "length"])[["rounds", "phi"]].last()
    assert (ends["rounds"] <= 300).all()
    phi = ends["phi"].groupby("contender").min()
    assert phi["ours"] < phi["no tuning"] and phi["random search"] < phi["no tuning"]
    assert (tmp_path / "q" / "tuning.png").stat().st_size > 10_000
