"""Handwritten digits, from scikit-learn."""

from __future__ import annotations

import numpy as np

from .base import Dataset, Facts, Source, split

FACTS = Facts("images", clients=20, hidden=64)  # 133 rows a class: a hundredth of them would leave two of the rarest


def digits(seed: int = 0) -> Dataset:
    """8x8 images of handwritten digits (scikit-learn's); a quarter of each class is for the test, drawn by `seed`."""
    from sklearn.datasets import load_digits

    images, labels = map(np.asarray, load_digits(return_X_y=True))
    return split("digits", images / 16, labels, seed, 10, FACTS, axis=None)


DIGITS = Source(
    "digits",
    "1,347 / 450 images of 64 pixels, 10 classes; p/16, then the training pixels' own overall mean and deviation",
    FACTS,
    lambda data_dir: digits(),
)
