"""What `Problem(features=...)` saves: an AggITD iteration with and without, on hyper-representation 784-200-10.

    python benchmarks/features.py

Random data of the task's shape; both compute the same numbers (asserted). Timed in turn, in one process; the ratio is
below one where features save time.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import fedbilevel as fb
from fedbilevel.tasks.hyper_representation import InnerLoss, features, outer_loss
from fedbilevel.tasks.network import layer

CLIENTS, COHORT, ROWS, INPUTS, HIDDEN, CLASSES = 100, 10, 300, 784, 200, 10
LOSS = InnerLoss()
WITH = fb.Problem(LOSS, outer_loss, features=features)
WITHOUT = fb.Problem(lambda x, y, row: LOSS(x, y, row, features(x, row)), outer_loss)


def setup():
    draw = np.random.default_rng(0)
    rows = lambda: {
        "a": draw.normal(size=(ROWS, INPUTS)).astype("f"),
        "label": draw.integers(0, CLASSES, ROWS).astype("i4"),
    }
    data = fb.FederatedData.stack([rows() for _ in range(CLIENTS)], [rows() for _ in range(CLIENTS)])
    return data, layer(jax.random.key(1), INPUTS, HIDDEN), layer(jax.random.key(2), HIDDEN, CLASSES)


def compare(name: str, algorithm: fb.AggITD, runs: int) -> None:
    data, x, y = setup()
    state, engine, key = algorithm.init(x, y), fb.Simulation(cohort=COHORT), jax.random.key(0)

    def program(problem):
        execution = engine.bind(problem, data, algorithm, state, key)
        carry = execution.start(algorithm, state)
        return lambda: execution.advance(algorithm, carry, 1, 1e10)[0].state

    programs = {"with": program(WITH), "without": program(WITHOUT)}
    one, other = (jax.tree.leaves(run()) for run in programs.values())
    gap = max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(one, other, strict=True))
    assert gap < 1e-4, f"not the same computation: {gap}"
    times = {label: [] for label in programs}
    for _ in range(runs):
        for label, run in programs.items():
            begin = time.perf_counter()
            run()
            times[label].append(time.perf_counter() - begin)
    with_ms, without_ms = (1e3 * statistics.median(times[label]) for label in ("with", "without"))
    ratios = sorted(a / b for a, b in zip(times["with"], times["without"], strict=True))
    print(
        f"{name:36} {with_ms:9.2f} {without_ms:12.2f} {with_ms / without_ms:7.3f}   "
        f"{ratios[len(ratios) // 4]:.3f} - {ratios[-len(ratios) // 4]:.3f}   {gap:.0e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    runs = parser.parse_args().runs
    print(
        f"AggITD, N = 5, {COHORT} of {CLIENTS} clients with {ROWS} rows, network {INPUTS}-{HIDDEN}-{CLASSES}, "
        f"{runs} runs each, JAX {jax.__version__} on {jax.devices()[0].platform}"
    )
    print(f"{'':36} {'with, ms':>9} {'without, ms':>12} {'ratio':>7}   middle half of ratios   difference")
    common = {"inner_rounds": 5, "hessian_lr": 0.01, "outer_lr": 0.01}
    for name, steps, size in (
        ("1 local step, minibatches of 64 rows", 1, 64),
        ("40 local steps, 64 rows each", 40, 64),
        ("5 local steps, all rows", 5, None),
    ):
        compare(name, fb.AggITD(local_steps=steps, inner_lr=0.05 / steps, batch_size=size, **common), runs)


if __name__ == "__main__":
    main()
