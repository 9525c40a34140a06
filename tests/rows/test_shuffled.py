"""Permutations drawn side by side are numpy's own, one by one."""

from __future__ import annotations

import numpy as np
import pytest

from fedbilevel.rows import shuffled
from fedbilevel.rows.shuffled import alike, one, permutations

DRAW = np.random.default_rng(5)


def seeds(clients):
    return DRAW.integers(0, 2**32, (clients, 2), np.uint32)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 8, 17, 32, 100])
def test_alike_clients(count):
    own = seeds(200)
    assert alike(own, count).tolist() == [one(seed, count).tolist() for seed in own]


@pytest.mark.parametrize("extreme", [[0, 0], [0, 2**32 - 1], [2**32 - 1, 2**32 - 1]])
def test_extreme_seeds(extreme):
    seed = np.array(extreme, np.uint32)
    assert alike(seed[None], 7)[0].tolist() == np.random.default_rng(seed).permutation(7).tolist()


@pytest.mark.parametrize("words", [2, 4])
def test_unlike_clients(monkeypatch, words):
    monkeypatch.setattr(shuffled, "_BLOCK", 64)
    counts = np.concatenate([np.full(150, 5), np.full(40, 3), [1_000, 2, 0, 33], np.full(70, 1)])
    DRAW.shuffle(counts)
    own = DRAW.integers(0, 2**32, (len(counts), words), np.uint32)
    expected = [np.random.default_rng(seed).permutation(count) for seed, count in zip(own, counts, strict=True)]
    assert permutations(own, counts).tolist() == np.concatenate(expected).tolist()


def test_nobody():
    assert permutations(np.zeros((0, 2), np.uint32), np.zeros(0, int)).tolist() == []
