"""Breast cancer in Wisconsin, from scikit-learn."""

from __future__ import annotations

import numpy as np

from .base import Dataset, Facts, Source, split

FACTS = Facts("classes", clients=10)


def breast_cancer(seed: int = 0) -> Dataset:
    """Benign or malignant, from 30 features (scikit-learn's); a quarter of each class is for the test."""
    from sklearn.datasets import load_breast_cancer

    features, labels = map(np.asarray, load_breast_cancer(return_X_y=True))
    return split("breast-cancer", features, labels, seed, 2, FACTS)


BREAST_CANCER = Source(
    "breast-cancer",
    "426 / 143 rows of 30 features, 2 classes; features to training mean 0 and deviation 1, column by column",
    FACTS,
    lambda data_dir: breast_cancer(),
)
