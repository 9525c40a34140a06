"""Clients whose labels are wrong: weights that are learned, against none, and against leaving these clients out by hand.

    python benchmarks/client_weights.py [--dataset NAME] [--data-dir DIR] [--clients N] [--partition NAME] [--seeds 0 ...]
                                        [--rounds 300] [--quick]

The task `client-weights`: 20 clients of digits, of which 7 have no right label in training, everyone and all rows, 32 bits,
no step given. Ours is Lockstep at the task's penalty, 0.01. Rivals are trained by `fb.train` in as many rounds, at each of
four penalties, and shown at the one with the highest mean test accuracy over all seeds; so is ours in the line "ours, at its
best penalty". Weights: the largest of a bad client over the smallest of a good one, its mean and its largest over the seeds.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import fedbilevel as fb
from fedbilevel.tasks import client_weights
from fedbilevel.tasks.base import Options, Task
from fedbilevel.tasks.client_weights import PENALTY, InnerLoss, outer_loss, wrong_clients

GRID = (1e-4, 1e-3, 1e-2, 1e-1)


def ours(task: Task, rounds: int, penalty: float) -> tuple[float, float]:
    """Test accuracy, and the ratio of the weights."""
    problem = fb.Problem(InnerLoss(penalty), outer_loss)
    how = {"rounds": rounds, "key": task.key, "evaluate_every": rounds}
    result = fb.solve(problem, task.data, fb.Lockstep(), task.x, task.y, **how)
    return accuracy(task, result.y), float(task.metrics["weight_ratio"](result.x, result.y))


def trained(task: Task, rounds: int, penalty: float, clients: np.ndarray) -> tuple[float, float]:
    """Test accuracy of plain training on some of the clients; the ratio is nothing's."""
    rows = [[level.alone(int(i)).rows for i in clients] for level in (task.data.inner, task.data.outer)]
    data, x = fb.FederatedData.stack(rows[0], rows[1]), fb.per_client(np.zeros(len(clients), np.float32))
    how = {"rounds": rounds, "key": task.key, "evaluate_every": rounds}
    result = fb.train(fb.Problem(InnerLoss(penalty), outer_loss), data, x, task.y, **how)
    return accuracy(task, result.y), np.nan


def accuracy(task: Task, y: dict) -> float:
    return float(task.metrics["test_accuracy"](task.x, y))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--partition", default="iid")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="one seed, few rounds, one penalty: to see that it works")
    given = parser.parse_args()
    seeds, rounds, grid = ([0], 20, (PENALTY,)) if given.quick else (given.seeds, given.rounds, GRID)
    begin = time.perf_counter()
    options = [Options(given.dataset, given.data_dir, given.partition, given.clients, seed=seed) for seed in seeds]
    tasks = [client_weights(each) for each in options]
    bad = [wrong_clients(each, given.clients) for each in options]
    contenders = {
        "ours": (lambda k, penalty: ours(tasks[k], rounds, penalty), (PENALTY,)),
        "ours, at its best penalty": (lambda k, penalty: ours(tasks[k], rounds, penalty), grid),
        "no weighting": (lambda k, penalty: trained(tasks[k], rounds, penalty, np.arange(given.clients)), grid),
        "left out by hand": (lambda k, penalty: trained(tasks[k], rounds, penalty, np.flatnonzero(~bad[k])), grid),
    }
    print(f"{'':26} {'penalty':>8} {'accuracy':>9} {'least':>7} {'greatest':>8} {'weights':>8} {'largest':>8}")
    for name, (contend, penalties) in contenders.items():
        each = {penalty: np.array([contend(k, penalty) for k in range(len(tasks))]) for penalty in penalties}
        penalty = max(each, key=lambda one: each[one][:, 0].mean())
        scores, ratios = each[penalty].T
        weights = "" if np.isnan(ratios).any() else f"{ratios.mean():8.4f} {ratios.max():8.4f}"
        print(
            f"{name:26} {penalty:8g} {scores.mean():9.4f} {scores.min():7.4f} {scores.max():8.4f} {weights}", flush=True
        )
    print(f"{time.perf_counter() - begin:.0f} seconds in all")


if __name__ == "__main__":
    main()
