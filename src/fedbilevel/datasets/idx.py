"""Data sets of images in MNIST's format: a folder with four idx files, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from ..errors import InputError, check
from .base import Dataset, Facts, Folder, places

PIXELS = {"mnist": (0.1307, 0.3081), "fashion-mnist": (0.2860, 0.3530)}
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
LARGEST = 2**31  # bytes in one idx file: EMNIST, the largest in use, has a quarter of that
CHUNK = 2**20
LIKE_MNIST = Facts("images", clients=100, hidden=200, rarest=0.01, most=6_000)


def idx_folder(folder: str | os.PathLike[str], name: str) -> Dataset:
    """An MNIST-like data set: train-images-idx3-ubyte, train-labels-idx1-ubyte and the same of t10k, plain or .gz.

    Args:
        folder: where the four files lie.
        name: decides the normalisation: by the published constants for "mnist" and "fashion-mnist", else by the
            training pixels' own mean and deviation, p/255 before either.

    Raises:
        InputError: names the folder or file that is missing, is no idx file, or does not fit the others.
    """
    images, labels, test_images, test_labels = idx_arrays(folder)
    mean, deviation = PIXELS.get(name) or (images.mean() / 255, images.std() / 255)
    check(
        deviation > 0, f"all pixels of the training images in {folder} are equal: there is nothing to learn from them."
    )
    x_train, x_test = (_pixels(array, mean, deviation) for array in (images, test_images))
    y_train, y_test = labels.astype(np.int32), test_labels.astype(np.int32)
    classes = int(max(y_train.max(), y_test.max())) + 1
    return Dataset(name, x_train, y_train, x_test, y_test, classes, LIKE_MNIST)


def idx_arrays(folder: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images (rows, height, width) and labels (rows,), and the same of the test, as in the files: uint8.

    Raises:
        InputError: names the folder or file that is missing, is no idx file, or does not fit the others.
    """
    folder = Path(folder).expanduser()
    check(folder.is_dir(), f"there is no folder {folder}: pass the one that holds {', '.join(IDX_FILES)} (or .gz).")
    paths = [_file(folder, stem) for stem in IDX_FILES]
    images, labels, test_images, test_labels = map(read_idx, paths, (3, 1, 3, 1))
    for path, rows, answers in ((paths[1], images, labels), (paths[3], test_images, test_labels)):
        check(len(rows) == len(answers), f"{path} holds {len(answers)} labels for {len(rows)} images.")
    check(
        images.shape[1:] == test_images.shape[1:],
        f"{paths[2]} holds images of {test_images.shape[1:]} pixels, but the training images have {images.shape[1:]}.",
    )
    return images, labels, test_images, test_labels


def read_idx(path: str | os.PathLike[str], dimensions: int) -> np.ndarray:
    """The uint8 array in an idx file, plain or gzipped (told by its first bytes).

    The header is believed only as far as there are bytes to back it: nothing is allocated on its word.

    Raises:
        InputError: no such file, unreadable, not idx of `dimensions` dimensions of bytes, empty, cut short or too long.
    """
    path = Path(path)
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if zipped else open(path, "rb") as stream:
            header = stream.read(4 + 4 * dimensions)
            magic = bytes((0, 0, 8, dimensions))
            check(
                header[:4] == magic,
                f"{path} is not an idx file of bytes in {dimensions} dimension(s): it should begin with {magic.hex()}, "
                f"and begins with {header[:4].hex() or 'nothing'}.",
            )
            check(len(header) == 4 + 4 * dimensions, f"{path} ends within its header: fetch the file again.")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            size = math.prod(shape)  # of Python integers: it cannot overflow
            check(size > 0, f"{path} is empty: its header says {shape}.")
            check(size <= LARGEST, f"{path} says that it holds {shape}, more than the {LARGEST} bytes read at most.")
            body = bytearray()
            while chunk := stream.read(min(CHUNK, size + 1 - len(body))):  # one byte more would be too many
                body += chunk
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path} cannot be read ({reason}): check it, or fetch it again.") from error
    much = "more" if len(body) > size else f"only {len(body)}"
    check(len(body) == size, f"{path} should hold {shape} = {size} bytes and holds {much}: fetch the file again.")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _pixels(images: np.ndarray, mean: float, deviation: float) -> np.ndarray:
    x = images.reshape(len(images), -1).astype(np.float32)
    x /= 255  # in place: a copy of MNIST is 188 MB
    x -= np.float32(mean)
    x /= np.float32(deviation)
    return x


def _file(folder: Path, stem: str) -> Path:
    found = [path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()]
    check(found, f"there is no {stem} or {stem}.gz in {folder}: put the four files of the data set there.")
    return found[0]


def find_idx(name: str, data_dir: Folder) -> Path:
    """The folder with the files of "mnist" or "fashion-mnist": `data_dir`, NAME in it, or by default the cache.

    Raises:
        InputError: they are in none of these, or `data_dir` is the other data set's.
    """
    looked = places(name, data_dir)
    for place in looked:
        if any((place / (stem + end)).is_file() for stem in IDX_FILES for end in ("", ".gz")):
            own = place.absolute().name
            check(own == name or own not in PIXELS, f"{place} is named after {own}: pass the folder of {name}.")
            return place
    raise InputError(
        f"the data set {name} is not in {' or '.join(map(str, looked))}: pass --data-dir (data_dir=) with a folder "
        f"that holds {', '.join(IDX_FILES)} (or .gz), itself or in {name}/."
    )
