"""Labels of which two in five are wrong: cleaned, against no cleaning, the validation rows alone, and an oracle.

    python benchmarks/cleaning.py [--dataset NAME] [--data-dir DIR] [--partition NAME] [--clients N] [--cohort N]
                                  [--penalty 0.1] [--grid 0.001 ...] [--seeds 0 ...] [--rounds 120] [--retrain 300] [--quick]

The task `cleaning`, no step given, 32 bits. Ours: Lockstep finds x at one penalty (--penalty; the task's unless given), and
a model is then trained from the start by `fb.train` with the weights that x says. The contenders are trained in the same
way: with all weights one, on the validation rows alone, and by an oracle that drops every wrong row. Each is shown at that
one of the penalties --grid that is best by its mean test accuracy over all seeds. Found is the area under the curve of the
weights against wrong labels, F1 that of the flags (a weight below half of the median), both of the rows whose client was
ever asked.
"Of the oracle's gain" is what ours gains over no cleaning for each point that the oracle gains.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import jax
import numpy as np

import fedbilevel as fb
from fedbilevel.arrays import held
from fedbilevel.datasets import load
from fedbilevel.tasks import cleaning
from fedbilevel.tasks.base import Options, Task
from fedbilevel.tasks.cleaning import PENALTY, InnerLoss, dealt

GRID = (0.001, 0.003, 0.01, 0.03, 0.1)
DROPPED = -40.0  # the logit of a weight of nothing
TOLD = ("found", "flagged", "never_asked")


def at(task: Task, penalty: float) -> fb.Problem:
    """The task's problem at another penalty on y."""
    return dataclasses.replace(task.problem, inner=InnerLoss(held(penalty)))


def cleaned(task: Task, engine: fb.Simulation, rounds: int, penalty: float) -> tuple[fb.PerClient, list[float]]:
    """x, and what the metrics say of it."""
    how = {"rounds": rounds, "key": task.key, "engine": engine, "evaluate_every": rounds}
    x = fb.solve(at(task, penalty), task.data, fb.Lockstep(), task.x, task.y, **how).x
    return x, [float(task.metrics[name](x, task.y)) for name in TOLD]


def trained(
    task: Task, data: fb.FederatedData, x: fb.PerClient, engine: fb.Simulation, rounds: int, penalty: float
) -> float:
    """The test accuracy of a model that is trained at x."""
    how = {"rounds": rounds, "key": task.key, "engine": engine, "evaluate_every": rounds, "check": False}
    y = fb.train(at(task, penalty), data, x, task.y, **how).y
    return float(task.metrics["test_accuracy"](x, y))


def alone(task: Task) -> fb.FederatedData:
    """The validation rows, at both levels."""
    each = [task.data.outer.alone(client).rows for client in range(task.data.clients)]
    place = lambda rows: {**rows, "place": np.arange(len(rows["label"]), dtype=np.int32)}
    return fb.FederatedData.stack([place(rows) for rows in each], each)


def blocks(rows: list[np.ndarray]) -> fb.PerClient:
    return fb.per_client([np.asarray(own, np.float32) for own in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--partition", default="iid")
    parser.add_argument("--clients", type=int)
    parser.add_argument("--cohort", type=int, help="how many clients each exchange asks; all unless given")
    parser.add_argument("--penalty", type=float, default=PENALTY, help="on y, while x is found")
    parser.add_argument("--grid", nargs="+", type=float, default=list(GRID), help="penalties of every training")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--rounds", type=int, default=120, help="of the run that finds x")
    parser.add_argument("--retrain", type=int, default=300, help="rounds of every training")
    parser.add_argument("--quick", action="store_true", help="one seed, few rounds: to see that it works")
    given = parser.parse_args()
    if given.quick:
        given.seeds, given.rounds, given.retrain = [0], 40, 20
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    begin, engine = time.perf_counter(), fb.Simulation(cohort=given.cohort)
    scores = {name: [] for name in ("no cleaning", "validation rows alone", "ours", "oracle")}
    told = []
    for seed in given.seeds:
        options = Options(given.dataset, given.data_dir, given.partition, given.clients, seed=seed)
        task = cleaning(options)
        wrong = dealt(options, load(given.dataset, given.data_dir)).wrong
        x, found = cleaned(task, engine, given.rounds, given.penalty)
        told.append(found)
        held_out = alone(task)
        start = blocks([np.zeros(count) for count in held_out.count("inner")])
        for name, data, at_x in (
            ("no cleaning", task.data, task.x),
            ("ours", task.data, x),
            ("oracle", task.data, blocks([np.where(own, DROPPED, 0) for own in wrong])),
            ("validation rows alone", held_out, start),
        ):
            each = [trained(task, data, at_x, engine, given.retrain, penalty) for penalty in given.grid]
            scores[name].append(each)
        print(f"seed {seed}: found {found[0]:.3f}, F1 {found[1]:.3f}", flush=True)
    print(f"{'':22} {'penalty':>8} {'accuracy':>9} {'least':>7} {'greatest':>8}   at each of {given.grid}")
    best = {}
    for name, each in scores.items():
        means = np.mean(each, axis=0)
        column = int(means.argmax())
        own, best[name] = np.array(each)[:, column], means[column]
        line = " ".join(f"{mean:.4f}" for mean in means)
        print(f"{name:22} {given.grid[column]:8g} {own.mean():9.4f} {own.min():7.4f} {own.max():8.4f}   {line}")
    share = (best["ours"] - best["no cleaning"]) / (best["oracle"] - best["no cleaning"])
    area, score, missing = np.mean(told, axis=0)
    least = np.min(told, axis=0)
    print(f"of the oracle's gain {share:.2f}; found {area:.3f} (least {least[0]:.3f}), F1 {score:.3f} ({least[1]:.3f})")
    print(f"rows never asked: {missing:.0f} a seed; {time.perf_counter() - begin:.0f} seconds in all")


if __name__ == "__main__":
    main()
