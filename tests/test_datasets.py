"""Data sets: shapes, normalisation, and an idx reader that believes no header."""

from __future__ import annotations

import gzip
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbilevel.datasets import DATASETS, IDX_FILES, LARGEST, embedded, idx_folder, load, read_idx
from fedbilevel.datasets.shuffle import halves, stratified
from fedbilevel.errors import InputError
from helpers.places import DATA

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
LABELS = np.array([0, 1, 2, 1, 0], np.uint8)


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def header(*shape: int) -> bytes:
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape)


def fill(folder: Path, suffix: str = "", **other: bytes) -> Path:
    """The four files of a small data set: 5 training images, 3 test images."""
    folder.mkdir(parents=True)
    for stem, array in zip(IDX_FILES, (IMAGES, LABELS, IMAGES[:3], LABELS[:3]), strict=True):
        content = other.get(stem.split("-idx")[0].replace("-", "_"), idx(array))
        (folder / f"{stem}{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    return folder


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No data of the machine's own."""
    monkeypatch.delenv("FEDBILEVEL_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def refusal(call) -> str:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(("name", "mean", "deviation"), [("mnist", 0.1307, 0.3081), ("fashion-mnist", 0.2860, 0.3530)])
def test_a_folder_is_read_and_normalised(tmp_path, suffix, name, mean, deviation):
    data = idx_folder(fill(tmp_path / "any", suffix), name)
    assert (data.name, data.classes) == (name, 3)
    assert data.x_train.dtype == data.x_test.dtype == np.float32 and data.y_train.dtype == np.int32
    np.testing.assert_allclose(data.x_train, (IMAGES.reshape(5, 12) / 255 - mean) / deviation, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(data.x_test, data.x_train[:3])
    np.testing.assert_array_equal(data.y_train, LABELS)
    np.testing.assert_array_equal(data.y_test, LABELS[:3])


def test_another_name_is_normalised_by_its_own_training_pixels(tmp_path):
    x = idx_folder(fill(tmp_path / "any"), "letters").x_train
    np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-6)


def bad_file(tmp_path, content: bytes, dimensions: int = 3) -> str:
    (tmp_path / "bad").write_bytes(content)
    message = refusal(lambda: read_idx(tmp_path / "bad", dimensions))
    assert str(tmp_path / "bad") in message
    return message


def test_files_that_are_not_what_they_should_be(tmp_path):
    good = idx(IMAGES)
    np.testing.assert_array_equal(read_idx_of(tmp_path, good), IMAGES)
    assert "only 59" in bad_file(tmp_path, good[:-1])
    assert "holds more" in bad_file(tmp_path, good + b"\0")
    assert "begins with nothing" in bad_file(tmp_path, b"")
    assert "ends within its header" in bad_file(tmp_path, good[:10])
    assert "not an idx file" in bad_file(tmp_path, b"\x89PNG" + good[4:])
    assert "not an idx file" in bad_file(tmp_path, bytes((0, 0, 13, 3)) + good[4:])  # floats
    assert "in 1 dimension" in bad_file(tmp_path, good, dimensions=1)
    assert "is empty" in bad_file(tmp_path, header(0, 28, 28))
    packed = gzip.compress(good)
    assert "cannot be read" in bad_file(tmp_path, packed[:-9])  # cut short
    assert "cannot be read" in bad_file(tmp_path, packed[:-8] + bytes(8))  # wrong checksum and length
    assert "cannot be read" in bad_file(tmp_path, packed[:12] + bytes(20) + packed[32:])
    assert "holds more" in bad_file(tmp_path, gzip.compress(good + b"\0"))
    assert "cannot be read" in refusal(lambda: read_idx(tmp_path / "absent", 3))


def read_idx_of(tmp_path, content: bytes) -> np.ndarray:
    (tmp_path / "good").write_bytes(content)
    return read_idx(tmp_path / "good", 3)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("shape", [(2**32 - 1,) * 3, (2**16, 2**16, 2**32 - 1), (2**31, 1, 1), (10**6, 28, 28)])
def test_a_giant_header_allocates_nothing(tmp_path, pack, shape):
    (tmp_path / "bad").write_bytes(pack(header(*shape) + b"few"))
    tracemalloc.start()
    try:
        message = refusal(lambda: read_idx(tmp_path / "bad", 3))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8e6  # the smallest of these headers asks for 784 MB
    assert ("only 3" in message) == (np.prod([float(n) for n in shape]) <= LARGEST)


def test_a_gzip_bomb_is_not_unpacked(tmp_path):
    (tmp_path / "bad").write_bytes(gzip.compress(header(5, 4, 3) + bytes(10**8)))
    tracemalloc.start()
    try:
        assert "holds more" in refusal(lambda: read_idx(tmp_path / "bad", 3))
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=60), st.integers(0, 76), st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_damage_is_refused_in_a_sentence_or_harmless(tmp_path_factory, noise, place, packed):
    good = gzip.compress(idx(IMAGES)) if packed else idx(IMAGES)
    path = tmp_path_factory.mktemp("damage") / "file"
    path.write_bytes(good[:place] + noise + good[place + len(noise) :])
    try:
        assert read_idx(path, 3).size == IMAGES.size
    except InputError as error:
        assert str(path) in str(error)


def test_files_that_do_not_fit_each_other(tmp_path):
    message = refusal(lambda: idx_folder(fill(tmp_path / "a", train_labels=idx(LABELS[:4])), "mnist"))
    assert "train-labels" in message and "4 labels for 5 images" in message
    message = refusal(lambda: idx_folder(fill(tmp_path / "b", t10k_labels=idx(LABELS)), "mnist"))
    assert "t10k-labels" in message and "5 labels for 3 images" in message
    message = refusal(lambda: idx_folder(fill(tmp_path / "c", t10k_images=idx(IMAGES[:3, :3])), "mnist"))
    assert "t10k-images" in message and "(3, 3)" in message
    flat = {"train_images": idx(IMAGES * 0)}
    assert "all pixels" in refusal(lambda: idx_folder(fill(tmp_path / "d", **flat), "letters"))
    (fill(tmp_path / "e") / IDX_FILES[2]).unlink()
    assert IDX_FILES[2] in refusal(lambda: idx_folder(tmp_path / "e", "mnist"))
    assert "no folder" in refusal(lambda: idx_folder(tmp_path / "absent", "mnist"))


def test_where_the_files_are_looked_for(tmp_path, monkeypatch):
    message = refusal(lambda: load("mnist"))
    assert "--data-dir" in message and str(tmp_path / "home" / ".cache" / "fedbilevel" / "mnist") in message
    fill(tmp_path / "home" / ".cache" / "fedbilevel" / "mnist")
    assert load("mnist").x_train.shape == (5, 12)
    narrow = {"train_images": idx(IMAGES[:, :2]), "t10k_images": idx(IMAGES[:3, :2])}
    parent = fill(tmp_path / "data" / "mnist", **narrow).parent
    for folder in (parent, parent / "mnist", os.fspath(parent)):  # given: nothing else counts
        assert load("mnist", folder).x_train.shape == (5, 6)
    monkeypatch.setenv("FEDBILEVEL_DATA", str(parent))  # before the cache
    assert load("mnist").x_train.shape == (5, 6)
    assert str(parent) in refusal(lambda: load("fashion-mnist"))
    assert "named after mnist" in refusal(lambda: load("fashion-mnist", parent / "mnist"))
    assert "absent" in refusal(lambda: load("mnist", tmp_path / "absent"))


def test_unknown_names():
    message = refusal(lambda: load("fashon-mnist"))
    assert "did you mean 'fashion-mnist'" in message and all(name in message for name in DATASETS)


ROWS = [("digits", 1797, 64, 10), ("diabetes", 442, 10, None), ("breast-cancer", 569, 30, 2)]


@pytest.mark.parametrize(("name", "rows", "features", "classes"), ROWS)
def test_embedded_data_sets(name, rows, features, classes):
    data, again = load(name), load(name)
    test = -(-rows // 4)
    assert data.x_train.shape == (rows - test, features) and data.x_test.shape == (test, features)
    assert data.y_train.shape == (rows - test,) and data.y_test.shape == (test,) and data.classes == classes
    assert data.x_train.dtype == data.x_test.dtype == np.float32
    np.testing.assert_array_equal(data.x_train, again.x_train)
    axis = None if name == "digits" else 0
    for x in [data.x_train] + [data.y_train] * (classes is None):  # exact on the training rows ...
        np.testing.assert_allclose(x.mean(axis, dtype=float), 0, atol=1e-6)
        np.testing.assert_allclose(x.std(axis, dtype=float), 1, atol=1e-5)
    assert 1e-4 < np.abs(data.x_test.mean(axis)).max() < 0.5  # ... and by their constants on the test rows
    if classes is None:
        assert data.y_train.dtype == data.y_test.dtype == np.float32
        return
    assert data.y_train.dtype == data.y_test.dtype == np.int32
    counts, held = np.bincount(data.y_train, minlength=classes), np.bincount(data.y_test, minlength=classes)
    np.testing.assert_allclose(held, (counts + held) / 4, atol=1)  # stratified


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_real_files(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"no {DATA / name} on this machine")
    data = load(name, DATA)
    assert data.x_train.shape == (60_000, 784) and data.x_test.shape == (10_000, 784) and data.classes == 10
    # the constants are the training pixels' mean and deviation to four digits, so what is left is their rounding
    mean, deviation = data.x_train.mean(dtype=float), data.x_train.std(dtype=float)
    scale = {"mnist": 0.3081, "fashion-mnist": 0.3530}[name]
    assert abs(mean) < 0.5e-4 / scale * 1.1 and abs(deviation - 1) < 0.5e-4 / scale * 1.1
    assert np.bincount(data.y_test).min() > 800 and data.y_train.max() == 9


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("labels", [[0] * 7 + [1] * 7 + [2] * 3 + [4] * 30, [3, 1] * 50, list(range(4)) * 6])
def test_the_rows_for_the_test_are_those_of_scikit_learn(labels, seed):
    from sklearn.model_selection import train_test_split

    labels, rows = np.array(labels), np.arange(len(labels))
    settings = {"test_size": 0.25, "random_state": seed}
    for ours, stratify in ((stratified(labels, seed), labels), (halves(len(labels), seed), None)):
        for mine, theirs in zip(ours, train_test_split(rows, stratify=stratify, **settings), strict=True):
            assert mine.tolist() == list(theirs)


@pytest.mark.parametrize("name", [name for name, *_ in ROWS])
def test_the_files_of_scikit_learn_hold_what_its_functions_give(monkeypatch, name):
    """Whatever became of its folder, the data set is the same."""
    read = load(name)
    monkeypatch.setattr(embedded, "table", lambda *_, **__: None)
    asked = load(name)
    for part in ("x_train", "y_train", "x_test", "y_test"):
        np.testing.assert_array_equal(getattr(read, part), getattr(asked, part), strict=True)


def test_a_file_that_is_not_there_or_has_other_numbers():
    assert embedded.table("digits.csv.gz", 1_797, 65, ",") is not None
    assert embedded.table("digits.csv.gz", 1_797, 64, ",") is None
    assert embedded.table("breast_cancer.csv", 569, 31, ",") is None  # its first line is no row
    assert embedded.table("nothing.csv", 1, 1) is None
