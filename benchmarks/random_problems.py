"""Lockstep with no step given on random problems in any units, against exact gradient descent with line search on Phi.

    python benchmarks/random_problems.py [--problems 200] [--first 0] [--rounds 300] [--folder DIR] [--again] [--quick]

The problems of `fb.testing.random_problem`, seeds FIRST, FIRST + 1, ...: quadratic and logistic, 2 to 50 clients, everyone,
cohorts and minibatches, units of x, y and the rows from 1e-3 to 1e3; 64 bits. The rival takes as many steps along the
exact gradient of Phi as there are rounds, each doubled until Phi falls too little (Armijo, 1/2) and then halved. "Share"
is the gain of the returned x, Phi(start) - Phi(x), over the rival's. "Times" is f of the returned x and y over f of the
start.

Printed: what is not finite; f above ten times the start's; shares of at least a half, and below -0.01; by mode; and the
worst. A line for each problem is kept in --folder (tab-separated), and a second call goes on from there; with --again only
the rival's are taken from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

import fedbilevel as fb
from fedbilevel.testing import RandomProblem, random_problem

COLUMNS = ("seed", "kind", "mode", "clients", "s_x", "s_y", "s_rows", "rival", "share", "times", "words")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=Path("results/random_problems"))
    parser.add_argument("--again", action="store_true", help="run Lockstep anew where a line is kept")
    parser.add_argument(
        "--quick", action="store_true", help="two problems, 20 rounds, nothing kept: to see that it works"
    )
    given = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    seeds = range(given.first, given.first + (2 if given.quick else given.problems))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if given.quick else given.folder
        judge(seeds, 20 if given.quick else given.rounds, folder, given.again)


def judge(seeds: range, rounds: int, folder: Path, again: bool) -> None:
    """Run what no line is kept of, and print."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, rivals = folder / f"runs-{rounds}.tsv", folder / f"rivals-{rounds}.tsv"
    if again:
        lines.unlink(missing_ok=True)
    begin, known, done = time.perf_counter(), _kept(rivals), _kept(lines)
    print("  ".join(COLUMNS))
    for seed in seeds:
        if seed in done:
            continue
        problem = random_problem(seed)
        if seed not in known:
            known[seed] = [str(seed), repr(descent(problem, rounds))]
            _add(rivals, known[seed])
        done[seed] = row(seed, problem, rounds, float(known[seed][1]))
        _add(lines, done[seed])
        print("  ".join(done[seed]), flush=True)
    summary([dict(zip(COLUMNS, done[seed], strict=True)) for seed in seeds])
    print(f"{time.perf_counter() - begin:.1f} seconds")


def _kept(file: Path) -> dict[int, list[str]]:
    if not file.exists():
        return {}
    return {int(line.split("\t")[0]): line.split("\t") for line in file.read_text().splitlines()}


def _add(file: Path, cells: list[str]) -> None:
    with file.open("a") as to:
        to.write("\t".join(cells) + "\n")


def row(seed: int, problem: RandomProblem, rounds: int, best: float) -> list[str]:
    """What happened on one problem, as words; `best` is where the rival ends."""
    x, y, words = run(problem, rounds)
    start, unit = problem.value(problem.x), problem.loss_factor
    rival = start - unit * best
    share = (start - problem.value(x)) / rival
    times = problem.outer_value(x, y) / problem.outer_value(problem.x, problem.y)
    figures = [f"{factor:.1e}" for factor in problem.factors] + [f"{rival / unit:.3e}", f"{share:.4f}", f"{times:.3f}"]
    return [str(seed), problem.kind, problem.mode, str(problem.data.clients), *figures, words]


def run(problem: RandomProblem, rounds: int) -> tuple[np.ndarray, np.ndarray, str]:
    """(The returned x and y of Lockstep with no step given; why it ended early, if it did)."""
    algorithm = fb.Lockstep(local_steps=5, batch_size=problem.batch_size)
    engine = dataclasses.replace(problem.engine, compile="quick")  # each problem is compiled, and takes no time beside
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fb.errors.FedbilevelWarning)
        try:
            result, words = fb.solve(
                problem.problem, problem.data, algorithm, problem.x, problem.y, rounds=rounds,
                key=jax.random.key(0), engine=engine, check=False, evaluate_every=rounds,
            ), ""  # fmt: skip
        except fb.RunError as error:
            result, words = error.result, " ".join(str(error).split())
    return np.asarray(result.x), np.asarray(result.y), words


def descent(problem: RandomProblem, steps: int) -> float:
    """Phi at the end of exact gradient descent with line search, before scaling: one factor for all of x changes no step."""
    model = problem.model
    x, step = model.x, 1.0
    now = model.value(x)
    for _ in range(steps):
        h = model.hypergradient(x)
        falls = lambda size, x=x, h=h, now=now: model.value(x - size * h) <= now - 0.5 * size * (h @ h)
        while falls(2 * step) and step < 1e30:
            step *= 2
        while not falls(step) and step > 1e-30:
            step /= 2
        after = model.value(x - step * h)
        if not after < now:  # rounding errors are all that is left
            return now
        x, now = x - step * h, after
    return now


def summary(rows: list[Mapping[str, str]]) -> None:
    shares, times = (np.array([float(row[name]) for row in rows]) for name in ("share", "times"))
    strange = ~(np.isfinite(shares) & np.isfinite(times))
    print(f"\n{len(rows)} problems: {strange.sum()} not finite, {sum(bool(row['words']) for row in rows)} ended early, "
          f"{np.sum(times > 10)} with f above 10 times the start's")  # fmt: skip
    print(f"{'':32} {'problems':>8} {'>= half':>8} {'< -0.01':>8} {'median':>8} {'least':>8}")
    groups = {"all": np.full(len(rows), True)}
    for name in ("kind", "mode"):
        groups |= {
            value: np.array([row[name] == value for row in rows]) for value in sorted({row[name] for row in rows})
        }
    for name, own in groups.items():
        some = np.where(np.isfinite(shares[own]), shares[own], -math.inf)
        half, below = np.sum(some >= 0.5), np.sum(some < -0.01)
        print(f"{name:32} {own.sum():8} {half:8} {below:8} {np.median(some):8.3f} {some.min():8.3f}")
    worst = [rows[k]["seed"] for k in np.argsort(np.where(np.isfinite(shares), shares, -math.inf))[:10]]
    print(f"the least shares: seeds {', '.join(worst)}")


if __name__ == "__main__":
    main()
