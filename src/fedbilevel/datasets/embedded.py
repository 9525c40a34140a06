"""Data sets that come with scikit-learn: handwritten digits, progression of diabetes, breast cancer in Wisconsin."""

from __future__ import annotations

import numpy as np

from .base import Dataset, Facts, Source, split

_DIGITS = Facts("images", clients=20, hidden=64)  # 133 rows a class: a hundredth of them would leave two of the rarest
_DIABETES = Facts("numbers", clients=10)
_BREAST_CANCER = Facts("classes", clients=10)


def digits(seed: int = 0) -> Dataset:
    """8x8 images of handwritten digits (scikit-learn's); a quarter of each class is for the test, drawn by `seed`."""
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
    from sklearn.datasets import load_breast_cancer

    features, labels = map(np.asarray, load_breast_cancer(return_X_y=True))
    return split("breast-cancer", features, labels, seed, 2, _BREAST_CANCER)


BREAST_CANCER = Source(
    "breast-cancer",
    "426 / 143 rows of 30 features, 2 classes; features to training mean 0 and deviation 1, column by column",
    _BREAST_CANCER,
    lambda data_dir: breast_cancer(),
)
