"""The gap in true-positive rates that group weights leave, on random splits: `python benchmarks/fair.py`.

Three tables: the made one, and the four hospitals by sex and by age (--data-dir: the folder that has heart-disease in it).
Contenders on each split, each at the penalty of one grid that is best on the validation rows by its own objective:

    no weights        x = 0, by the mean loss
    weights by hand   each group and label counts as much as any other, by F
    ours              x by `fb.solve` with Lockstep, no step given, in ROUNDS rounds, by F

All are trained to the end at their x (`reference.solution`) before they are tested. F is the task's outer loss. Told are
means over the splits, and of the differences to no weights, which are paired, the mean and its interval of 95 %. A gap's
size is that of one split, which has the noise of few test rows in it; the mean gap has less.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

import fedbilevel as fb
from fedbilevel.tasks import TASKS
from fedbilevel.tasks.fair import InnerLoss

GRID = (0.003, 0.01, 0.03, 0.1)
ROUNDS, SPLITS = 500, 40
WHERE = {"made": ("fair", None), "sex": ("fair", "heart-disease"), "age": ("fair-age", None)}


def contenders(task, rounds):
    """By name, (accuracy, gap) on the test rows."""
    shares = np.asarray(task.problem.inner.shares, float)
    by_hand = jnp.asarray(-np.log(shares), jnp.float32)
    found = {"no weights": [], "weights by hand": [], "ours": []}
    for penalty in GRID:
        inner = dataclasses.replace(task.problem.inner, penalty=jnp.asarray(penalty, jnp.float32))
        assert isinstance(inner, InnerLoss)
        problem = dataclasses.replace(task.problem, inner=inner)
        how = {"rounds": rounds, "key": task.key, "evaluate_every": rounds, "check": False}
        run = fb.solve(problem, task.data, fb.Lockstep(), task.x, task.y, **how)
        for (name, held), x in zip(found.items(), (task.x, by_hand, run.x), strict=True):
            y = fb.reference.solution(problem, task.data, x, task.y)
            means = fb.reference.outer_means(problem, task.data, x, y)
            score = float(means["loss"] if name == "no weights" else problem.outer_of(means))
            test = [float(task.metrics[each](x, y)) for each in ("test_accuracy", "test_gap")]
            held.append((score, penalty, *test))
    return {name: min(held)[2:] for name, held in found.items()}, {name: min(held)[1] for name, held in found.items()}


def interval(values):
    """The mean, and how far its interval of 95 % reaches."""
    values = np.asarray(values)
    return float(values.mean()), 2.02 * float(values.std(ddof=1)) / np.sqrt(len(values))


def table(where, splits, rounds, data_dir):
    name, dataset = WHERE[where]
    told = []
    for seed in range(splits):
        task = TASKS[name](dataset=dataset, data_dir=None if where == "made" else data_dir, seed=seed)
        told.append(contenders(task, rounds)[0])
    rows = []
    for contender in told[0]:
        accuracy, gap = (np.array([each[contender][k] for each in told]) for k in (0, 1))
        base = [np.array([each["no weights"][k] for each in told]) for k in (0, 1)]
        changes = [100 * (accuracy - base[0]), base[1] - gap, np.abs(base[1]) - np.abs(gap)]
        rows.append((contender, 100 * accuracy.mean(), gap.mean(), np.abs(gap).mean(), *map(interval, changes)))
    return rows


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data-dir", help="where heart-disease is; without it the made table alone")
    arguments.add_argument("--splits", type=int, default=SPLITS)
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    arguments.add_argument("--only", choices=list(WHERE))
    arguments.add_argument("--quick", action="store_true", help="two splits of the made table, a few rounds")
    given = arguments.parse_args()
    if given.quick:
        given.only, given.splits, given.rounds = "made", 2, 20
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    for where in WHERE if given.only is None else (given.only,):
        if where != "made" and given.data_dir is None:
            continue
        begin = time.perf_counter()
        rows = table(where, given.splits, given.rounds, given.data_dir)
        print(f"\n{where}: {given.splits} splits, {given.rounds} rounds, {time.perf_counter() - begin:.0f} s\n")
        print("| contender | accuracy, % | less no weights' | gap | no weights' less it | its size | smaller by |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name, accuracy, gap, size, *changes in rows:
            words = [f"{mean:+.3f} ± {wide:.3f}" for mean, wide in changes]
            more, moved, less = words
            print(f"| {name} | {accuracy:.1f} | {more} | {gap:+.3f} | {moved} | {size:.3f} | {less} |", flush=True)


if __name__ == "__main__":
    main()
