"""Data sets that come with scikit-learn: handwritten digits, progression of diabetes, breast cancer in Wisconsin.

Their numbers are read from its files, for to import it takes longer than to build a task. Where its folder holds
anything else than is expected, its own functions are asked.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from .base import Dataset, Facts, Source, split

_DIGITS = Facts("images", clients=20, hidden=64)  # 133 rows a class: a hundredth of them would leave two of the rarest
_DIABETES = Facts("numbers", clients=10)
_BREAST_CANCER = Facts("classes", clients=10)


def table(file: str, rows: int, columns: int, delimiter: str | None = None, header: int = 0) -> np.ndarray | None:
    """(rows, columns) float64, the numbers in a text file of scikit-learn's; None where there is no such file."""
    spec = importlib.util.find_spec("sklearn")  # looks for it, and does not import it
    for place in (spec and spec.submodule_search_locations) or ():
        path = Path(place) / "datasets" / "data" / file
        try:
            numbers = np.loadtxt(path, delimiter=delimiter, skiprows=header, ndmin=2)
        except (OSError, ValueError):
            continue
        if numbers.shape == (rows, columns):
            return numbers
    return None


def digits(seed: int = 0) -> Dataset:
    """8x8 images of handwritten digits (scikit-learn's); a quarter of each class is for the test, drawn by `seed`."""
    numbers = table("digits.csv.gz", 1_797, 65, ",")
    if numbers is not None:
        images, labels = numbers[:, :-1], numbers[:, -1].astype(int)
    else:
        from sklearn.datasets import load_digits

        images, labels = map(np.asarray, load_digits(return_X_y=True))
    return split("digits", images / 16, labels, seed, 10, _DIGITS, axis=None)


DIGITS = Source(
    "digits",
    "1,347 / 450 images of 64 pixels, 10 classes; p/16, then the training pixels' own overall mean and deviation",
    _DIGITS,
    lambda data_dir: digits(),
)


def diabetes(seed: int = 0) -> Dataset:
    """Progression of diabetes, a regression on 10 features (scikit-learn's); a quarter of the rows is for the test."""
    numbers, answers = table("diabetes_data_raw.csv.gz", 442, 10), table("diabetes_target.csv.gz", 442, 1)
    if numbers is not None and answers is not None:
        features, targets = numbers, answers[:, 0]
    else:
        from sklearn.datasets import load_diabetes

        features, targets = map(np.asarray, load_diabetes(return_X_y=True, scaled=False))
    return split("diabetes", features, targets, seed, None, _DIABETES)


DIABETES = Source(
    "diabetes",
    "331 / 111 rows of 10 features, a number; all to training mean 0 and deviation 1, column by column",
    _DIABETES,
    lambda data_dir: diabetes(),
)


def breast_cancer(seed: int = 0) -> Dataset:
    """Benign or malignant, from 30 features (scikit-learn's); a quarter of each class is for the test."""
    numbers = table("breast_cancer.csv", 569, 31, ",", header=1)
    if numbers is not None:
        features, labels = numbers[:, :-1], numbers[:, -1].astype(int)
    else:
        from sklearn.datasets import load_breast_cancer

        features, labels = map(np.asarray, load_breast_cancer(return_X_y=True))
    return split("breast-cancer", features, labels, seed, 2, _BREAST_CANCER)


BREAST_CANCER = Source(
    "breast-cancer",
    "426 / 143 rows of 30 features, 2 classes; features to training mean 0 and deviation 1, column by column",
    _BREAST_CANCER,
    lambda data_dir: breast_cancer(),
)
