"""Other units, the same path? Lockstep with no step given, with x -> s x, y -> s y, f and g -> s f, s g.

    python benchmarks/equivariance.py [--problems 6] [--rounds 100] [--quick]

The problems of `fb.testing.random_problem`, 64 bits, s = 1e-3, 1 and 1e3. A path is x after every iteration, in the units
of s = 1; the gap is the largest difference of an entry to the path of s = 1, over the largest entry of x on that path.
Printed: the gap over the whole path and over its second half, and the iteration from which on it stays at most 1e-6.
"""

from __future__ import annotations

import argparse
import time
import warnings

import jax
import numpy as np

import fedbilevel as fb
from fedbilevel.testing import RandomProblem, random_problem

FACTORS, SAME = (1e-3, 1e3), 1e-6


class Path(fb.callbacks.Callback):
    """x after every iteration."""

    def __init__(self):
        self.xs: list[np.ndarray] = []

    def record(self, run, rows):
        self.xs += [np.asarray(run.x)] * len(rows)

    def went_back(self, run):
        del self.xs[run.iteration + 1 :]


def path(problem: RandomProblem, s: float, rounds: int) -> np.ndarray:
    """(iterations + 1, dx) x in the units of s = 1, up to where the run ends."""
    scaled = lambda loss: lambda x, y, row: s * loss(x / s, y / s, row)
    other = fb.Problem(scaled(problem.problem.inner), scaled(problem.problem.outer))
    algorithm, seen = fb.Lockstep(local_steps=5, batch_size=problem.batch_size), Path()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fb.errors.FedbilevelWarning)
        try:
            fb.solve(
                other, problem.data, algorithm, s * problem.x, s * problem.y, rounds=rounds, key=jax.random.key(0),
                engine=problem.engine, callbacks=[seen], check=False,
            )  # fmt: skip
        except fb.RunError as error:
            print(f"      s = {s:g}: {' '.join(str(error).split())}")
    return np.array(seen.xs) / s


def compare(seed: int, rounds: int) -> float:
    """A line for each s; the largest gap of the second halves."""
    problem, worst = random_problem(seed), 0.0
    own = path(problem, 1.0, rounds)
    for s in FACTORS:
        other = path(problem, s, rounds)
        count = min(len(own), len(other))
        gaps = np.abs(own[:count] - other[:count]).max(axis=1) / np.abs(own).max()
        late = np.flatnonzero(~(gaps <= SAME))
        since = 0 if not len(late) else late[-1] + 1
        told = f"{since}" if since < count else "never"
        half = float(gaps[count // 2 :].max())
        worst = max(worst, half)
        where = f"{seed:7} {problem.kind:10} {problem.mode:22}"
        print(f"{where} {s:8g} {gaps.max():10.1e} {half:12.1e} {told:>8}", flush=True)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="one problem, twenty rounds: to see that it works")
    given = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    print(f"{'problem':>7} {'kind':10} {'mode':22} {'s':>8} {'gap':>10} {'second half':>12} {'same from':>8}")
    begin = time.perf_counter()
    worst = max(
        compare(seed, 20 if given.quick else given.rounds) for seed in range(1 if given.quick else given.problems)
    )
    print(f"largest gap of the second halves: {worst:.9f}; {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
