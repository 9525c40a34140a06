"""Permutations that numpy draws for many clients, each with a seed of its own, all at once.

`numpy.random.default_rng(seed).permutation(count)` takes some 7 microseconds before it draws the first number. For a
million clients of few rows the same numbers are drawn here side by side: numpy's `SeedSequence` (O'Neill's `seed_seq`
in Python), PCG64 (XSL-RR, 128 bits in two words), its numbers below a bound, and the shuffle of Fisher and Yates.
Clients of many rows are left to numpy itself.
"""

from __future__ import annotations

import numpy as np

_LONGEST = 32  # rows of a client: beyond these numpy's own loop over them is quicker
_FEWEST = 32  # clients with as many rows each: fewer do not pay for a pass over all of them
_BLOCK = 2**16  # clients a pass, which bounds the memory that it takes
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_STEP = (np.uint64(0x2360ED051FC65DA4), np.uint64(0x4385DF649FCCF645))  # PCG64's multiplier, high and low word

_Words = tuple[np.ndarray, np.ndarray]  # 128 bits: the high and the low word, uint64


def permutations(seeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(sum of counts,) int64: client after client, `default_rng(seeds[i]).permutation(counts[i])`.

    Args:
        seeds: (clients, words) uint32.
        counts: (clients,) how many rows each has.
    """
    ends = np.cumsum(counts)
    out = np.empty(ends[-1] if len(ends) else 0, np.int64)
    sizes, where, many = np.unique(counts, return_inverse=True, return_counts=True)
    together = (many >= _FEWEST) & (sizes <= _LONGEST) & (seeds.shape[1] == 2)
    for client in np.flatnonzero(~together[where]):
        out[ends[client] - counts[client] : ends[client]] = one(seeds[client], int(counts[client]))
    for kind in np.flatnonzero(together):
        count = int(sizes[kind])
        clients = np.flatnonzero(where == kind)
        for begin in range(0, len(clients), _BLOCK):
            some = clients[begin : begin + _BLOCK]
            out[(ends[some] - count)[:, None] + np.arange(count)] = alike(seeds[some], count)
    return out


def one(seed: np.ndarray, count: int) -> np.ndarray:
    """numpy's own permutation for one seed, (words,) uint32."""
    return np.random.default_rng(seed).permutation(count)


def alike(seeds: np.ndarray, count: int) -> np.ndarray:
    """(clients, count) int64: a row is `one(seeds[i], count)`."""
    order = np.tile(np.arange(count), (len(seeds), 1))
    everybody, stream = np.arange(len(seeds)), _Words32(seeds)
    for last in range(count - 1, 0, -1):
        other = stream.at_most(last)
        moved = order[everybody, other]
        order[everybody, other] = order[:, last]
        order[:, last] = moved
    return order


class _Words32:
    """Words of 32 bits for each client, of which each uses as many as it needs.

    numpy's `random_interval`: the bits of a word that the bound has, and the next word where they say more than it.
    """

    def __init__(self, seeds: np.ndarray):
        self._bits = _Bits(seeds)
        self._words = np.empty((0, len(seeds)), np.uint32)
        self._used = np.zeros(len(seeds), np.int64)

    def at_most(self, last: int) -> np.ndarray:
        """(clients,) int64, uniform in [0, last]."""
        mask = np.uint32((1 << last.bit_length()) - 1)
        out = np.empty(len(self._used), np.int64)
        waiting = np.arange(len(out))
        while len(waiting):
            drawn = self._next(waiting) & mask
            out[waiting] = drawn
            waiting = waiting[drawn > last]
        return out

    def _next(self, clients: np.ndarray) -> np.ndarray:
        used = self._used[clients]
        while used.max() >= len(self._words):
            more = [self._bits.draw() for _ in range(2)]
            self._words = np.concatenate([self._words[self._used.min() :], np.array(more, np.uint32)])
            self._used -= self._used.min()
            used = self._used[clients]
        self._used[clients] += 1
        return self._words[used, clients]


class _Bits:
    """Streams of 32 bits, as PCG64 gives them out: the lower half of a word, then the upper one."""

    def __init__(self, seeds: np.ndarray):
        high, low, first, second = _seed_words(seeds)
        one = np.uint64(1)
        self._add = (first << one) | (second >> np.uint64(63)), (second << one) | one
        self._state = _step(_plus(self._add, (high, low)), self._add)
        self._kept: np.ndarray | None = None

    def draw(self) -> np.ndarray:
        """(clients,) uint64 below 2**32."""
        if self._kept is not None:
            kept, self._kept = self._kept, None
            return kept
        self._state = high, low = _step(self._state, self._add)
        word, turn = high ^ low, high >> np.uint64(58)
        word = (word >> turn) | (word << ((np.uint64(64) - turn) & np.uint64(63)))
        self._kept = word >> _HALF
        return word & _LOW


def _step(state: _Words, add: _Words) -> _Words:
    """state * multiplier + add, modulo 2**128."""
    (high, low), (times_high, times_low) = state, _STEP
    a, b, c, d = low >> _HALF, low & _LOW, times_low >> _HALF, times_low & _LOW
    middle = a * d + (b * d >> _HALF)
    other = b * c + (middle & _LOW)
    carried = a * c + (middle >> _HALF) + (other >> _HALF)
    return _plus((high * times_low + low * times_high + carried, low * times_low), add)


def _plus(one: _Words, other: _Words) -> _Words:
    low = one[1] + other[1]
    return one[0] + other[0] + (low < one[1]), low


def _seed_words(seeds: np.ndarray) -> list[np.ndarray]:
    """numpy's `SeedSequence(seeds[i]).generate_state(4, uint64)`, four arrays (clients,)."""
    mixed = _Hash(0x43B0D7E5, 0x931E8875)
    nothing = np.zeros(len(seeds), np.uint32)
    pool = [mixed(part) for part in (seeds[:, 0], seeds[:, 1], nothing, nothing)]
    for source in range(4):
        for target in range(4):
            if source != target:
                both = np.uint32(0xCA01F9DD) * pool[target] - np.uint32(0x4973F715) * mixed(pool[source])
                pool[target] = both ^ (both >> np.uint32(16))
    mixed = _Hash(0x8B51F9DD, 0x58F38DED)
    parts = [mixed(pool[k % 4]).astype(np.uint64) for k in range(8)]
    return [low | (high << _HALF) for low, high in zip(parts[::2], parts[1::2], strict=True)]


class _Hash:
    """The hash of `SeedSequence`, whose constant changes with every call."""

    def __init__(self, start: int, factor: int):
        self._constant, self._factor = start, factor

    def __call__(self, value: np.ndarray) -> np.ndarray:
        value = value ^ np.uint32(self._constant)
        self._constant = self._constant * self._factor % 2**32
        value = value * np.uint32(self._constant)
        return value ^ (value >> np.uint32(16))
