"""What `Problem(features=...)` saves: an AggITD iteration with and without, on hyper-representation 784-200-10.

    python benchmarks/features.py [--quick]

Random data of the task's shape; all compute the same numbers (asserted). Timed in turn, in one process; the ratios are
below one where features save time. "Each exchange" is what features cost where the simulation does not know that all
exchanges of an iteration are at one x: every client method then computes them anew, once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import fedbilevel as fb
from fedbilevel.engines.simulated.federation import SimulatedFederation
from fedbilevel.tasks.hyper_representation import InnerLoss, features, outer_loss
from fedbilevel.tasks.network import layer

CLIENTS, COHORT, ROWS, INPUTS, HIDDEN, CLASSES = 100, 10, 300, 784, 200, 10
QUICK = {"CLIENTS": 4, "COHORT": 2, "ROWS": 8, "INPUTS": 6, "HIDDEN": 4, "CLASSES": 3}
LOSS = InnerLoss()
WITH = fb.Problem(LOSS, outer_loss, features=features)
WITHOUT = fb.Problem(lambda x, y, row: LOSS(x, y, row, features(x, row)), outer_loss)
OTHERWISE = fb.Problem(LOSS, outer_loss, features=lambda x, row: 1.0 * features(x, row))  # compiled apart from WITH


def setup(clients: int):
    draw = np.random.default_rng(0)
    rows = lambda: {
        "a": draw.normal(size=(ROWS, INPUTS)).astype("f"),
        "label": draw.integers(0, CLASSES, ROWS).astype("i4"),
    }
    data = fb.FederatedData.stack([rows() for _ in range(clients)], [rows() for _ in range(clients)])
    return data, layer(jax.random.key(1), INPUTS, HIDDEN), layer(jax.random.key(2), HIDDEN, CLASSES)


def compare(name: str, algorithm: fb.AggITD, clients: int, runs: int) -> None:
    data, x, y = setup(clients)
    state, engine, key = algorithm.init(x, y), fb.Simulation(cohort=COHORT), jax.random.key(0)

    def program(problem):
        execution = engine.bind(problem, data, algorithm, state, key)
        carry = execution.start(algorithm, state)
        run = lambda: execution.advance(algorithm, carry, 1, 1e10)[0].state
        run()
        return run

    programs = {"with": program(WITH), "without": program(WITHOUT)}
    with mock.patch.object(SimulatedFederation, "_remember"):
        programs["each exchange"] = program(OTHERWISE)
    ends = [jax.tree.leaves(run()) for run in programs.values()]
    gap = max(float(jnp.max(jnp.abs(a - b))) for end in ends[1:] for a, b in zip(ends[0], end, strict=True))
    assert gap < 1e-4, f"not the same computation: {gap}"
    times = {label: [] for label in programs}
    for _ in range(runs):
        for label, run in programs.items():
            begin = time.perf_counter()
            run()
            times[label].append(time.perf_counter() - begin)
    ms = [1e3 * statistics.median(times[label]) for label in ("with", "each exchange", "without")]
    print(f"{name:44}", *(f"{each:14.2f}" for each in ms), end="")
    for label in ("each exchange", "without"):
        ratios = sorted(a / b for a, b in zip(times["with"], times[label], strict=True))
        middle = f"{ratios[len(ratios) // 4]:.3f} - {ratios[-len(ratios) // 4]:.3f}"
        print(f"  {statistics.median(ratios):7.3f} ({middle})", end="")
    print(f"  {gap:.0e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="a small network, two runs: to see that it works")
    given = parser.parse_args()
    runs = 2 if given.quick else given.runs
    if given.quick:
        globals().update(QUICK)
    print(
        f"AggITD, N = 5, {COHORT} clients an exchange with {ROWS} rows each, network {INPUTS}-{HIDDEN}-{CLASSES}, "
        f"{runs} runs each, JAX {jax.__version__} on {jax.devices()[0].platform}"
    )
    times = f"{'with, ms':>14} {'each exchange':>14} {'without':>14}"
    print(f"{'':44} {times}  with / each exchange  with / without (middle halves)")
    common = {"inner_rounds": 5, "hessian_lr": 0.01, "outer_lr": 0.01}
    if given.quick:
        return compare("1 local step", fb.AggITD(local_steps=1, inner_lr=0.01, batch_size=4, **common), CLIENTS, runs)
    for name, steps, size in (
        ("1 local step, minibatches of 64 rows", 1, 64),
        ("40 local steps, 64 rows each", 40, 64),
        ("5 local steps, all rows", 5, None),
    ):
        algorithm = fb.AggITD(local_steps=steps, inner_lr=0.05 / steps, batch_size=size, **common)
        compare(f"{name}, {COHORT} of {CLIENTS}", algorithm, CLIENTS, runs)
        compare(f"{name}, all {COHORT}", algorithm, COHORT, runs)


if __name__ == "__main__":
    main()
