"""Hyperband, written from the box of Li, Jamieson, DeSalvo, Rostamizadeh and Talwalkar (JMLR 2018).

A resource is a round of training. With R the most that one x gets, eta = 3 and r the least,

    s_max = floor(log_eta(R / r)),   B = (s_max + 1) R
    for s = s_max, ..., 0:   n = ceil(B/R eta^s / (s + 1)) values of x at random
        for i = 0, ..., s:   train the n_i = floor(n eta^-i) left to R eta^(i-s) rounds each,
                             judge them, keep the floor(n_i / eta) best

What is ours: an x that is kept goes on from its y and pays for the rounds that are added (they
measure a step anew); judging is a round; R eta^-s is rounded, and never below r; the whole begins
again until the budget is spent. It returns the x with the lowest f seen, as in the paper.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import PyTree

from .purse import Purse, Spent
from .search import candidates

ETA = 3
LEAST = 3  # rounds that an x gets: one measures the step, two train


def brackets(longest: int) -> Iterator[list[tuple[int, int]]]:
    """The rungs of each bracket, (values of x, rounds of each in all), the widest first."""
    most = int(math.log(longest / LEAST) / math.log(ETA) + 1e-9)
    for s in range(most, -1, -1):
        n = math.ceil((most + 1) * ETA**s / (s + 1))
        yield [(n // ETA**i, max(LEAST, round(longest * ETA ** (i - s)))) for i in range(s + 1)]


def hyperband(purse: Purse, longest: int, seed: int) -> None:
    """Hyperband with `longest` rounds for one x at most, again and again."""
    xs = candidates(purse.ground, purse.task.x, seed)
    with contextlib.suppress(Spent):
        while True:
            for rungs in brackets(longest):
                _halving(purse, rungs, xs)


def _halving(purse: Purse, rungs: list[tuple[int, int]], xs: Iterator[PyTree]) -> None:
    """Successive halving: one bracket."""
    first = purse.task.y
    left: list[tuple[PyTree, PyTree]] = [(next(xs), first) for _ in range(rungs[0][0])]
    before = 0
    for count, rounds in rungs:
        judged = []
        for x, y in left[:count]:
            y = purse.train(x, y, rounds - before)
            value = purse.value(x, y)
            purse.saw(x, value)
            if np.isfinite(value):
                judged.append((value, x, y))
        judged.sort(key=lambda each: each[0])
        left, before = [(x, y) for _, x, y in judged], rounds
