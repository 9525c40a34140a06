"""FedNest with the settings of its authors' public code, on MNIST: rounds to an accuracy, cpu time of a round, peak memory.

    python benchmarks/fednest_settings.py --data-dir DIR [--partition shards] [--cohorts same] [--seeds 0 1 2]

Hyper-representation: network 784-200-10, dropout 0.5 on the hidden layer in everything that is trained on (validation rows
too, as in that code) and none in the evaluation, penalty 0.05 (|W| + |b|) on the head (norms, not their squares), entries
uniform in +-1/sqrt(inputs) at the start. 100 clients: two label shards each (480 training and 120 validation rows), or
iid (300 and 300). 10 clients a round, T = 1, N = 5 with all terms summed, one upper step, every step 0.01, and of 64 rows
40 local lower steps (25 iid: five passes over a client's rows). 2T+N+3 = 10 rounds an iteration; one evaluation each.

`--cohorts same` asks, as that code does, one cohort in the two lower rounds and another in the eight upper ones; `fresh`
asks a fresh one every time. `--means all` answers every mean gradient and product from all rows of a client, as that code
does; `--means batch` from 64, as our algorithms do. `--masks own`: the two gradients of a local step drop their own hidden
units, as in that code; `shared`: the same ones. Other differences: our rows are drawn with replacement, and our Neumann
series is the paper's. "growth" is the most that the series' factors stretched the vector in one iteration.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import resource
import statistics
import sys
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import fedbilevel as fb
from fedbilevel.algorithm import component
from fedbilevel.algorithms.components.steps import norm
from fedbilevel.algorithms.components.upper import one_cohort
from fedbilevel.datasets import find_idx, idx_arrays
from fedbilevel.partition import partition
from fedbilevel.tasks.base import cross_entropy
from fedbilevel.tasks.network import layer

LEVELS = (0.80, 0.85, 0.88, 0.90)
CLIENTS, COHORT, HIDDEN, CLASSES = 100, 10, 200, 10
LOCAL_STEPS = {"shards": 40, "iid": 25}
HELD = {"shards": 0.2, "iid": 0.5}
MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's pixels over 255


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder of MNIST's four idx files (or .gz)")
    parser.add_argument("--partition", choices=list(HELD), default="shards")
    parser.add_argument("--cohorts", choices=["same", "fresh"], default="same")
    parser.add_argument("--means", choices=["batch", "all"], default="batch")
    parser.add_argument("--masks", choices=["own", "shared"], default="own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=1800)
    parser.add_argument("--cores", type=int, default=1, help="cores to use: fewer waste less cpu time on waiting")
    parser.add_argument("--quick", action="store_true", help="one seed and twenty rounds: to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.rounds = [0], 20
    return options


def hidden(x, example):
    """The hidden layer of one example, whose pixels are kept as bytes: a quarter of the memory."""
    pixels = (example["a"].astype(jnp.float32) / 255 - MEAN) / DEVIATION
    return jax.nn.relu(pixels @ x["weight"] + x["bias"])


def random_words(seeds, rows, columns):
    """(rows, columns) uint32 of random bits: a counter and each of the seeds, uint32, through murmur3's mixing.

    Enough for dropout; unlike JAX's own generator it compiles to no loop.
    """
    words = jnp.arange(rows * columns, dtype=jnp.uint32).reshape(rows, columns) * jnp.uint32(0x9E3779B9)
    for seed in seeds:
        words = words ^ seed
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            words = (words ^ (words >> shift)) * jnp.uint32(factor)
        words = words ^ (words >> 16)
    return words


def half_dropped(seeds, phi):
    """`phi` (rows, units) with every unit dropped with probability 1/2 and the others doubled; one random bit for each."""
    rows, units = phi.shape
    kept = (random_words(seeds, rows, -(-units // 32))[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return phi * 2 * kept.reshape(rows, -1)[:, :units].astype(phi.dtype)


def penalty(y):
    """0.05 (|W| + |b|)."""
    return 0.05 * (jnp.linalg.norm(y["weight"]) + jnp.linalg.norm(y["bias"]))


class Dropout(fb.Problem):
    """Hyper-representation whose oracles drop hidden units by the key of the rows they are given.

    Unless `shared_masks`, the point counts too: the two gradients of a FedSVRG step, on the same rows, drop other units.
    """

    shared_masks: bool = eqx.field(static=True, default=False)

    def inner_value(self, x, y, rows):
        phi = rows.features if rows.computed_at(x) else self.row_features(x, rows.examples)
        return self._loss(y, phi, rows) + penalty(y)

    def outer_value(self, x, y, rows):
        return self._loss(y, self.row_features(x, rows.examples), rows)

    def _loss(self, y, phi, rows):
        if rows.key is not None:
            point = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(jnp.sum(y["weight"])), jnp.uint32)
            phi = half_dropped([*jax.random.key_data(rows.key), *([] if self.shared_masks else [point])], phi)
        losses = jax.vmap(cross_entropy)(phi @ y["weight"] + y["bias"], rows.examples["label"])
        return jnp.sum(rows.weights * losses)


def problem(shared_masks: bool) -> Dropout:
    """The two losses; the plain ones are there for what has no key."""
    return Dropout(
        inner=lambda x, y, e, phi: cross_entropy(phi @ y["weight"] + y["bias"], e["label"]) + penalty(y),
        outer=lambda x, y, e: cross_entropy(hidden(x, e) @ y["weight"] + y["bias"], e["label"]),
        features=hidden,
        shared_masks=shared_masks,
    )


class AllRows(fb.Algorithm):
    """FedNest whose means are of all rows of each client; its local lower steps use minibatches. One upper step."""

    fednest: fb.FedNest

    @component
    def means(self) -> fb.FedNest:
        """FedNest with all rows."""
        return dataclasses.replace(self.fednest, batch_size=None)

    def init(self, x, y):
        return self.fednest.init(x, y)

    def step(self, fed, state):
        batch, means, x = self.fednest, self.means, state.x

        def turn(t, loop):
            cohort = one_cohort(fed, batch.same_cohort)
            q = fed.average(means.lower.gradient, x, loop[0], cohort=cohort)
            return fed.average(batch.lower.steps, x, loop[0], q, cohort=cohort), norm(q)

        y, slope = fed.repeat(batch.inner_rounds, turn, (state.y, jnp.zeros_like(norm(state.y))))
        factors = means.series.draw(fed)
        cohort = one_cohort(fed, batch.same_cohort)
        v, stretched, lag = means.series.rounds(fed, x, y, factors, None, cohort)
        h = means.upper.estimate(fed, x, y, v, cohort)
        mean = means.upper.move(fed, x, y, v, h, cohort)
        return dataclasses.replace(state, x=mean, y=y), fb.Info(norm(h), stretched, lag, slope)


def mnist(folder: Path) -> list[np.ndarray]:
    """Training images (rows, 784) uint8 and labels, and the same of the test."""
    images, labels, test_images, test_labels = idx_arrays(folder)
    flat = lambda a: a.reshape(len(a), -1)
    return [flat(images), labels.astype(np.int32), flat(test_images), test_labels.astype(np.int32)]


@jax.jit
def accuracy(x, y, a, labels):
    """The share of rows that the network gets right, without dropout."""
    logits = lambda row: hidden(x, {"a": row}) @ y["weight"] + y["bias"]
    return jnp.mean(jnp.argmax(jax.lax.map(logits, a, batch_size=1000), axis=1) == labels)


def train(options: argparse.Namespace, algorithm: fb.Algorithm, seed: int):
    """[(rounds, accuracy)] and cpu seconds a round of every iteration; wall seconds a round; its rounds; largest growth."""
    images, labels, *test = mnist(options.data_dir)
    deal, split, start, run = jax.random.split(jax.random.key(seed), 4)
    parts = partition(options.partition, labels, CLIENTS, deal)
    clients = [{"a": images[rows], "label": labels[rows]} for rows in parts]
    data = fb.FederatedData.split(clients, HELD[options.partition], split)
    body, head = jax.random.split(start)
    state = algorithm.init(layer(body, images.shape[1], HIDDEN), layer(head, HIDDEN, CLASSES))
    del clients, images
    test = [jnp.asarray(array) for array in test]
    execution = fb.Simulation(cohort=COHORT).bind(problem(options.masks == "shared"), data, algorithm, state, run)
    carry = execution.start(algorithm, state)
    execution.advance(algorithm, carry, 0, np.inf)  # compiles
    curve, rounds, cpu, wall, growth = [], 0, [], 0.0, 0.0
    while rounds + execution.protocol.rounds_most <= options.rounds:
        begin = time.process_time()
        carry, record = execution.advance(algorithm, carry, 1, np.inf)
        cpu.append((time.process_time() - begin) / sum(record.rounds))
        wall, rounds = wall + record.seconds, rounds + sum(record.rounds)
        growth = max(growth, float(record.info.vector_growth.max()))
        curve.append((rounds, float(accuracy(carry.state.x, carry.state.y, *test))))
    return curve, cpu, wall / rounds, execution.protocol.rounds, growth


def report(seed: int, curve, cpu, wall, each, growth) -> list[int | None]:
    """Print a seed's line; the rounds to each level."""
    first = [next((n for n, value in curve if value >= level), None) for level in LEVELS]
    at, best = max(curve, key=lambda point: point[1])
    times = f"{1e3 * statistics.mean(cpu):14.1f} {1e3 * min(cpu):6.1f} {1e3 * wall:8.1f}"
    hits = " ".join(f"{'never' if n is None else n:>7}" for n in first)
    print(f"{seed:4} {each:19} {times} {hits} {best:7.2%} {at:5} {growth:8.3g}", flush=True)
    return first


def main() -> None:
    options = arguments()
    try:
        options.data_dir = find_idx("mnist", options.data_dir)
    except fb.InputError as error:
        sys.exit(str(error))
    if hasattr(os, "sched_setaffinity"):  # before JAX starts its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    fednest = fb.FedNest(
        inner_rounds=1, neumann_terms=5, truncation="full", inner_lr=0.01, hessian_lr=0.01, outer_lr=0.01,
        local_steps=LOCAL_STEPS[options.partition], outer_steps=1, batch_size=64, same_cohort=options.cohorts == "same",
    )  # fmt: skip
    algorithm = fednest if options.means == "batch" else AllRows(fednest)
    print(
        f"FedNest, {options.partition}, {options.cohorts} cohorts, means of {options.means}, {options.masks} masks, "
        f"{options.cores} core(s), "
        f"JAX {jax.__version__} on {jax.devices()[0].platform}\n"
        f"{'seed':>4} {'rounds an iteration':>19} {'cpu ms a round':>14} {'least':>6} {'wall ms':>8} "
        + " ".join(f"{f'{level:.0%} at':>7}" for level in LEVELS)
        + f" {'best':>7} {'at':>5} {'growth':>8}"
    )
    # a process for each seed: its peak of memory is that of one run
    alone = {"max_workers": 1, "max_tasks_per_child": 1, "mp_context": multiprocessing.get_context("spawn")}
    with concurrent.futures.ProcessPoolExecutor(**alone) as pool:
        runs = pool.map(functools.partial(train, options, algorithm), options.seeds)
        reached = [report(seed, *run) for seed, run in zip(options.seeds, runs, strict=True)]
    middle = [
        statistics.median_low([options.rounds + 1 if n is None else n for n in column])
        for column in zip(*reached, strict=True)
    ]
    print("median of the seeds:", ", ".join(f"{level:.0%} at {n}" for level, n in zip(LEVELS, middle, strict=True)))
    print(f"peak memory of a run: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3:.0f} MB")


if __name__ == "__main__":
    main()
