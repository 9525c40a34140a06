"""Progression of diabetes, from scikit-learn."""

from __future__ import annotations

import numpy as np

from .base import Dataset, Facts, Source, split

FACTS = Facts("numbers", clients=10)


def diabetes(seed: int = 0) -> Dataset:
    """Progression of diabetes, a regression on 10 features (scikit-learn's); a quarter of the rows is for the test."""
    from sklearn.datasets import load_diabetes

    features, targets = map(np.asarray, load_diabetes(return_X_y=True, scaled=False))
    return split("diabetes", features, targets, seed, None, FACTS)


DIABETES = Source(
    "diabetes",
    "331 / 111 rows of 10 features, a number; all to training mean 0 and deviation 1, column by column",
    FACTS,
    lambda data_dir: diabetes(),
)
