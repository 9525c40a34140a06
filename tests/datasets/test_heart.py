"""The hospitals' files: what is missing, what a row becomes, and what is said where they are not there."""

from __future__ import annotations

import numpy as np
import pytest

from fedbilevel.datasets import load
from fedbilevel.datasets.heart import COLUMNS, GROUPS, HOSPITALS, prepared, read_hospital
from fedbilevel.errors import InputError
from helpers import hospitals
from helpers.places import DATA

GOOD = ",".join("1" * 14)
FEATURES = [each for group in GROUPS for each in group]


def test_rows_keep_their_hospital_and_a_quarter_of_each_is_for_the_test(tmp_path):
    data = load("heart-disease", hospitals.write(tmp_path))
    for i, name in enumerate(HOSPITALS):
        held = data.sites_test == i
        assert held.sum() == hospitals.ROWS[name] // 4
        assert held.sum() + (data.sites_train == i).sum() == hospitals.ROWS[name]
        own = data.x_train[data.sites_train == i]
        np.testing.assert_allclose(own.mean(0), 0, atol=1e-6)
        deviation = own.std(0)
        assert np.all(np.isclose(deviation, 1, atol=1e-5) | (deviation == 0))
        assert data.y_test[held].mean() == pytest.approx(2 / 3, abs=0.2)  # stratified
    never = data.x_train[data.sites_train == HOSPITALS.index("switzerland")][:, FEATURES.index("chol")]
    assert not never.any()  # zeros in the file say that nothing was measured
    assert not data.x_train[data.sites_train == HOSPITALS.index("hungarian")][:, FEATURES.index("ca")].any()
    assert data.x_train.dtype == data.x_test.dtype == np.float32 and data.classes == 2
    assert set(data.y_train) == set(data.y_test) == {0, 1}


def test_what_is_missing_becomes_the_lower_median_of_the_training_rows():
    train, test = np.zeros((4, len(COLUMNS))), np.zeros((2, len(COLUMNS)))
    age, thal = COLUMNS.index("age"), COLUMNS.index("thal")
    train[:, age], test[:, age] = [40, 50, 60, np.nan], [np.nan, 90]
    train[:, thal], test[:, thal] = [3, 7, np.nan, np.nan], [np.nan, 7]
    wide, wide_test = prepared(train, test)
    ages = np.array([40, 50, 60, 50])
    np.testing.assert_allclose(wide[:, 0], (ages - 50) / ages.std(), rtol=1e-6)
    np.testing.assert_allclose(wide_test[:, 0], [0, 40 / ages.std()], rtol=1e-6)
    seven = wide_test[:, FEATURES.index(("thal", 7))]
    assert seven[0] < 0 < seven[1]  # 3, not the 5 between 3 and 7, which no heart has
    assert not wide[:, FEATURES.index(("thal", 6))].any()


def test_where_they_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FEDBILEVEL_DATA", raising=False)
    with pytest.raises(InputError) as caught:
        load("heart-disease")
    said, cache = str(caught.value), tmp_path / "home" / ".cache" / "fedbilevel" / "heart-disease"
    assert all(f"processed.{name}.data" in said for name in HOSPITALS)
    assert f"into {cache}" in said and "--data-dir" in said and "\n" not in said
    cache.mkdir(parents=True)
    hospitals.write(cache)
    assert len(load("heart-disease").y_train) == 54
    other = tmp_path / "other" / "heart-disease"
    other.mkdir(parents=True)
    hospitals.write(other, dict.fromkeys(HOSPITALS, 12), stem="")  # the names that a mirror may have
    for folder in (other, other.parent):
        assert len(load("heart-disease", folder).y_train) == 36
    monkeypatch.setenv("FEDBILEVEL_DATA", str(other.parent))
    assert len(load("heart-disease").y_train) == 36
    (other / "va.data").unlink()
    with pytest.raises(InputError, match=r"there is no processed.va.data in .*heart-disease"):
        load("heart-disease")


@pytest.mark.parametrize(
    "words",
    ["1 0 63 1 -9\n2 0 67 1 -9", "1,2,3\n4,5,6", f"{GOOD}\n1,2", "", f"{GOOD}\n{GOOD[:-1]}?", f"{GOOD}\nage{GOOD[1:]}"],
)
def test_what_is_no_such_table_is_refused(tmp_path, words):
    path = tmp_path / "processed.va.data"
    path.write_text(words)
    with pytest.raises(InputError, match=r"processed.va.data"):
        read_hospital(path)


@pytest.mark.skipif(not (DATA / "heart-disease").is_dir(), reason="no folder with the hospitals' files")
def test_the_real_files():
    data = load("heart-disease", DATA)
    sizes = np.bincount(data.sites_train) + np.bincount(data.sites_test)
    assert sizes.tolist() == [303, 294, 123, 200] and len(data.y_train) == 689
    ill = np.bincount(data.sites_train, data.y_train) + np.bincount(data.sites_test, data.y_test)
    assert ill.tolist() == [139, 106, 115, 149]
    assert data.x_train.shape[1] == 17 and np.isfinite(data.x_train).all() and np.isfinite(data.x_test).all()
