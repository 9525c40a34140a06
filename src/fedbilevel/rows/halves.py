"""Each client's rows dealt out at random to the inner and the outer level, in the same way for whatever holds them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from ..errors import check
from .joined import Chosen
from .shuffled import permutations


def check_share(outer: float) -> float:
    """The share of rows for the outer level, if it is one.

    Raises:
        InputError: it is not between 0 and 1.
    """
    number = isinstance(outer, (int, float, np.number, np.ndarray, jax.Array)) and np.ndim(outer) == 0
    check(
        number and 0.0 < outer < 1.0,
        f"outer= is the share of rows for the outer level, between 0 and 1; got {outer}.",
    )
    return float(outer)


def halves(counts: np.ndarray, outer: float, seeds: np.ndarray) -> tuple[Chosen, Chosen]:
    """(The rows for the inner level, those for the outer one), of each client in the order drawn from its seed."""
    held = held_out(counts, outer)
    order = permutations(seeds, counts)
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    outside = place < np.repeat(held, counts)
    return Chosen(order[~outside], counts - held), Chosen(order[outside], held)


def held_out(counts: np.ndarray, outer: float) -> np.ndarray:
    """(clients,) how many rows of each go to the outer level; at least one of each stays at either."""
    return np.clip(np.rint(outer * counts).astype(np.int64), 1, counts - 1)


def by_kind(kinds: Sequence[np.ndarray], outer: float, seeds: np.ndarray) -> tuple[Chosen, Chosen]:
    """As `halves`, as many rows of each client and in the same order, but of each kind of its rows the same share.

    Shares are rounded so that a client's sum is right: those kinds get one more that are the furthest below theirs.

    Args:
        kinds: of each client, (rows,) the kind of each row, a number from 0 on.
    """
    counts = np.array([len(own) for own in kinds])
    held = held_out(counts, outer)
    inside, outside = [], []
    for own, most, seed in zip(kinds, held, seeds, strict=True):
        order = permutations(seed[None], np.array([len(own)]))
        sizes = np.bincount(own)
        share = sizes * (most / len(own))
        several = np.floor(share).astype(np.int64)
        more = np.argsort(several - share, kind="stable")[: int(most - several.sum())]
        several[more] += 1
        ordered = own[order]
        sorted_ = np.argsort(ordered, kind="stable")  # within a kind in the order drawn
        rank = np.empty(len(own), np.int64)
        rank[sorted_] = np.arange(len(own)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        out = rank < several[ordered]
        inside.append(order[~out])
        outside.append(order[out])
    return Chosen(np.concatenate(inside), counts - held), Chosen(np.concatenate(outside), held)
