"""Personal heads on a shared body, against one common head, and against own heads on the body of the start.

    python benchmarks/personal.py [--dataset NAME] [--data-dir DIR] [--width UNITS] [--seeds 0 ...] [--rounds 300] [--quick]

The task `personal`: 20 clients with label shards of digits, 300 rounds, everyone, all rows, no step given, 32 bits. Ours is
Lockstep, which finds the body's penalty and a penalty for every client's head while it trains. A rival has fixed penalties:
each of four for body and heads, trained by `fb.train` in as many rounds; it is shown at the one with the highest mean test
accuracy over all seeds, which is more than it could know. "Own heads" are ours without the upper level. Figures are means
over the seeds, of the mean and of the worst client; "less" is the mean difference to ours, and its least and greatest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

import fedbilevel as fb
from fedbilevel.tasks.base import Options, Task
from fedbilevel.tasks.personal import build, inner_loss, outer_loss

GRID = (1e-4, 1e-3, 1e-2, 1e-1)


def ours(task: Task, rounds: int) -> list[float]:
    """Test accuracies of the mean and the worst client, with penalties that are found."""
    how = {"rounds": rounds, "key": task.key, "evaluate_every": rounds}
    result = fb.solve(task.problem, task.data, fb.Lockstep(), task.x, task.y, **how)
    return told(task, result.y)


def trained(task: Task, rounds: int, y: dict, frozen: dict, penalty: float) -> dict:
    """y, and what is frozen, after training at one penalty."""
    log = jnp.log(jnp.asarray(penalty, jnp.float32))
    x = {"body": log, "head": log}
    problem = fb.Problem(
        lambda x, y, row: inner_loss(x, frozen | y, row), lambda x, y, row: outer_loss(x, frozen | y, row)
    )
    how = {"rounds": rounds, "key": task.key, "evaluate_every": rounds, "check": False}
    return frozen | fb.train(problem, task.data, x, y, **how).y


def own(task: Task, rounds: int, penalty: float) -> list[float]:
    return told(task, trained(task, rounds, task.y, {}, penalty))


def at_the_start(task: Task, rounds: int, penalty: float) -> list[float]:
    head = {"head": task.y["head"]}
    return told(task, trained(task, rounds, head, {"body": task.y["body"]}, penalty))


def common(task: Task, rounds: int, penalty: float) -> list[float]:
    head = {name: leaf[0] for name, leaf in task.y["head"].items()}
    y = trained(task, rounds, {"body": task.y["body"], "head": head}, {}, penalty)
    alike = {name: fb.per_client(np.stack([leaf] * task.data.clients)) for name, leaf in y["head"].items()}
    return told(task, y | {"head": alike})


def told(task: Task, y: dict) -> list[float]:
    return [float(task.metrics[name](task.x, y)) for name in ("test_accuracy", "worst_accuracy")]


RIVALS: dict[str, Callable[[Task, int, float], list[float]]] = {
    "one common head": common,
    "own heads, body of the start": at_the_start,
    "own heads": own,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--width", type=int, default=6, help="units of the body")
    parser.add_argument("--clients", type=int)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="one seed, few rounds, one penalty: to see that it works")
    given = parser.parse_args()
    seeds, rounds, grid = ([0], 20, GRID[1:2]) if given.quick else (given.seeds, given.rounds, GRID)
    begin = time.perf_counter()
    options = [Options(given.dataset, given.data_dir, "shards", clients=given.clients, seed=seed) for seed in seeds]
    tasks = [build(each, given.width) for each in options]
    best = np.array([ours(task, rounds) for task in tasks])
    print(f"{'':30} {'penalty':>8} {'mean client':>12} {'worst client':>13} {'less':>6} {'least':>6} {'greatest':>8}")
    print(f"{'ours':30} {'found':>8} {best[:, 0].mean():12.4f} {best[:, 1].mean():13.4f}", flush=True)
    for name, train in RIVALS.items():
        each = {penalty: np.array([train(task, rounds, penalty) for task in tasks]) for penalty in grid}
        penalty = max(each, key=lambda one: each[one][:, 0].mean())
        less = 100 * (best[:, 0] - each[penalty][:, 0])
        mean, worst = each[penalty].mean(axis=0)
        print(
            f"{name:30} {penalty:8g} {mean:12.4f} {worst:13.4f} {less.mean():6.2f} {less.min():6.2f} {less.max():8.2f}",
            flush=True,
        )
    print(f"{time.perf_counter() - begin:.0f} seconds in all")


if __name__ == "__main__":
    main()
