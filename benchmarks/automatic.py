"""What steps that are found cost, against steps that are given: python benchmarks/automatic.py [--quick] [--against PATH]

Each figure is of a process of its own, which has compiled nothing before and keeps nothing: "first" are the cpu seconds
of a `solve` of three iterations, "iteration" those of one of the iterations after the first twenty (the least of three
runs of 300, compiled in full), "bytes" the payload of 300 iterations. Each with "auto", with numbers, and the ratio.

With --against, another checkout (a folder with `src`) is measured in turn with this one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
TASKS = {
    "quadratic": {},
    "bank": {},
    "ridge": {"dataset": "diabetes"},
    "regularisation": {"dataset": "breast-cancer"},
    "hyper-representation": {"dataset": "digits", "partition": "shards", "clients": 20},
}
CHILD = """
import json, sys, time
import jax
import fedbilevel as fb
from fedbilevel.tasks import TASKS, Options
name, options, algorithm, how, long = json.loads(sys.argv[1])
task = TASKS[name].build(Options(**options))
numbers = {} if how == "auto" else {"inner_lr": 1e-3, "hessian_lr": 1e-3, "outer_lr": 1e-3}
kind = {"Lockstep": fb.Lockstep, "AggITD": lambda **steps: fb.AggITD(truncation="full", **steps)}[algorithm](**numbers)

def solve(iterations, **how):
    begin = time.process_time()
    given = {"key": jax.random.key(0), "check": False, "engine": fb.Simulation(**how)}
    result = fb.solve(task.problem, task.data, kind, task.x, task.y, iterations, **given)
    return time.process_time() - begin, result

first, _ = solve(3)
solve(long, compile="full")
spent, result = min((solve(long, compile="full") for _ in range(3)), key=lambda each: each[0])
short = min(solve(20, compile="full")[0] for _ in range(3))
last, one = result.history[-1], (spent - short) / (long - 20)
print(json.dumps({"first": first, "iteration": one, "bytes": last["bytes_down"] + last["bytes_up"]}))
"""


def measured(checkout: Path, *words: object) -> dict[str, float]:
    """One process's figures."""
    paths = os.pathsep.join([str(checkout / "src"), str(checkout / "studies" / "src")])
    environment = {**os.environ, "PYTHONPATH": paths, "FEDBILEVEL_CACHE": "off"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(words)], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one task, 40 iterations: to see that it works")
    parser.add_argument("--against", type=Path, help="another checkout")
    given = parser.parse_args()
    tasks, long = (dict(list(TASKS.items())[:1]), 40) if given.quick else (TASKS, 300)
    checkouts = [HERE] if given.against is None else [HERE, given.against]
    print(f"{'task':21} {'algorithm':9} {'':6} {'first':>12} {'':>6} {'ms an iteration':>17} {'':>6} {'bytes':>6}")
    for task, options in tasks.items():
        for algorithm in ("Lockstep", "AggITD"):
            for checkout in checkouts:
                auto, numbers = (measured(checkout, task, options, algorithm, how, long) for how in ("auto", "numbers"))
                ratio = {name: auto[name] / numbers[name] for name in auto}
                both = lambda name, scale: f"{scale * auto[name]:.2f} / {scale * numbers[name]:.2f}"  # noqa: B023
                where = "here" if checkout == HERE else "there"
                line = f"{task:21} {algorithm:9} {where:6} {both('first', 1):>12} {ratio['first']:6.2f} "
                line += f"{both('iteration', 1e3):>17} {ratio['iteration']:6.2f} {ratio['bytes']:6.2f}"
                print(line, flush=True)


if __name__ == "__main__":
    main()
