"""Which rows are for the test, drawn as scikit-learn draws them, without importing it.

`import sklearn` takes longer than to build a task. The rows are those of its `train_test_split`, in the same order.
"""

from __future__ import annotations

import math

import numpy as np

Halves = tuple[np.ndarray, np.ndarray]  # rows for training, rows for the test


def halves(rows: int, seed: int, share: float = 0.25) -> Halves:
    """`share` of the rows at random for the test, the rest for training, each in random order."""
    test = math.ceil(share * rows)
    order = np.random.RandomState(seed).permutation(rows)
    return order[test:], order[:test]


def stratified(labels: np.ndarray, seed: int, share: float = 0.25) -> Halves:
    """The same with each label in both as often as in the whole, but for rounding."""
    draw = np.random.RandomState(seed)
    _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    test = math.ceil(share * len(labels))
    for_training = _apportioned(counts, len(labels) - test, draw)
    for_test = _apportioned(counts - for_training, test, draw)
    train, held = [], []
    for label, (many, few) in enumerate(zip(for_training, for_test, strict=True)):
        order = np.flatnonzero(place == label)[draw.permutation(counts[label])]
        train.append(order[:many])
        held.append(order[many : many + few])
    return draw.permutation(np.concatenate(train)), draw.permutation(np.concatenate(held))


def _apportioned(counts: np.ndarray, total: int, draw: np.random.RandomState) -> np.ndarray:
    """`total` shared out in proportion to `counts`: rounded down, and one more for the largest remainders.

    Among equal remainders those who get one are drawn.
    """
    exact = counts / counts.sum() * total
    shares = np.floor(exact)
    left, remainders = int(total - shares.sum()), exact - shares
    for value in np.unique(remainders)[::-1]:
        if left <= 0:
            break
        equal = np.flatnonzero(remainders == value)
        chosen = draw.choice(equal, size=min(len(equal), left), replace=False)
        shares[chosen] += 1
        left -= len(chosen)
    return shares.astype(int)
