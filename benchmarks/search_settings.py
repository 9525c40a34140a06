"""Search the step sizes of every algorithm on one grid, equal for all, and print the best as lines for settings.toml.

    python benchmarks/search_settings.py hyper-representation digits --partition shards --rounds 150

The measure is the mean over two seeds (10 and 11, which no test or figure uses) of the metric at the end: test_loss or
test_error, or Phi where the task knows it. Loops, local steps and batch sizes are equal for all algorithms (T = N = 5).
"""

from __future__ import annotations

import argparse
import itertools
import math

import equinox as eqx

import fedbilevel as fb
from fedbilevel.algorithms import ALGORITHMS
from fedbilevel.tasks import TASKS

GRID = {"inner_lr": (0.01, 0.03, 0.1, 0.3), "hessian_lr": (0.01, 0.03, 0.1), "outer_lr": (0.1, 0.3, 1.0, 3.0)}
SEEDS = (10, 11)


def score(task, algorithm, rounds: int) -> tuple[float, float]:
    """(the metric at the end, infinite where the run blew up; the last accuracy or nan)."""
    try:
        result = fb.solve(task.problem, task.data, algorithm, task.x, task.y, rounds=rounds, key=task.key,
                          metrics=task.metrics, evaluate_every=10_000)  # fmt: skip
    except fb.Diverged:
        return math.inf, math.nan
    last = result.history[-1]
    measure = next(last[name] for name in ("value", "test_loss", "test_error") if name in last)
    return (measure if math.isfinite(measure) else math.inf), last.get("test_accuracy", math.nan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("dataset")
    parser.add_argument("--partition", default="iid")
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--outer-steps", type=int, default=5)
    args = parser.parse_args()
    tasks = [TASKS[args.task](dataset=args.dataset, partition=args.partition, seed=seed) for seed in SEEDS]
    print(f"[{args.task}.{args.dataset}]")
    for name, kind in ALGORITHMS.items():
        fixed = {"inner_rounds": 5, "local_steps": 5, "outer_steps": args.outer_steps}
        if name != "aggitd":
            fixed["neumann_terms"] = 5
        algorithm = kind(**fixed)
        best = (math.inf, math.nan, {})
        for values in itertools.product(*GRID.values()):
            rates = dict(zip(GRID, values, strict=True))
            tried = eqx.tree_at(lambda a: [getattr(a, r) for r in GRID], algorithm, list(values))
            results = [score(task, tried, args.rounds) for task in tasks]
            mean = sum(r[0] for r in results) / len(results)
            best = min(best, (mean, sum(r[1] for r in results) / len(results), rates), key=lambda b: b[0])
        inside = ", ".join(f"{k} = {v}" for k, v in {**fixed, **best[2]}.items())
        print(f"{name} = {{ {inside} }}  # {best[0]:.4g}, accuracy {best[1]:.3f}", flush=True)


if __name__ == "__main__":
    main()
