"""What a call of an estimator costs, beside an iteration of `solve`: python benchmarks/estimator.py [--quick]

`estimator(x, y, key)` in a Python loop that moves x by hand, against the iterations of one `solve` of the same algorithm on
the same engine; both without compilation, medians of blocks that take turns. Then how many bytes of arrays and of the
process 1,000 calls leave behind, and what a call of `estimate_hypergradient`, which binds anew, takes.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time

import jax
import psutil

import fedbilevel as fb

ALLOWED = "3 iterations + 0.3 ms"
STEPS = {"inner_lr": 0.01, "hessian_lr": 0.01, "outer_lr": 0.05}
ALGORITHMS = {
    "AggITD": fb.AggITD(**STEPS),
    "AggITD, full": fb.AggITD(**STEPS, truncation="full", batch_size=8),
    "FedNest": fb.FedNest(**STEPS),
    "FedMBO": fb.FedMBO(**STEPS),
    "LFedNest": fb.LFedNest(**STEPS),
    "FedF2SA": fb.FedF2SA(inner_lr=0.01, outer_lr=0.05),
}


def resident() -> float:
    """Resident memory now, MB."""
    return psutil.Process().memory_info().rss / 1e6


def compare(name: str, algorithm: fb.Algorithm, task, engine: fb.engines.Engine, calls: int, blocks: int) -> None:
    given = task.problem, task.data, algorithm, task.x, task.y
    begin = time.perf_counter()
    estimator = fb.estimator(*given, engine=engine)
    bound = time.perf_counter() - begin
    keys = list(jax.random.split(task.key, calls))

    def loop() -> float:
        x, y = task.x, task.y
        begin = time.perf_counter()
        for key in keys:
            jax.block_until_ready(estimator(x, y, key))
        return (time.perf_counter() - begin) / calls

    def iterate() -> float:
        run = fb.solve(*given, iterations=calls, key=task.key, engine=engine, check=False)
        return run.history[-1]["seconds"] / calls

    loop(), iterate()
    pairs = [(loop(), iterate()) for _ in range(blocks)]
    gc.collect()
    arrays, before = len(jax.live_arrays()), resident()
    for _ in range(-(-1000 // calls)):
        loop()
    gc.collect()
    left, grown = len(jax.live_arrays()) - arrays, resident() - before
    begin = time.perf_counter()
    fb.estimate_hypergradient(*given, key=task.key, engine=engine)
    anew = time.perf_counter() - begin
    call, iteration = (1e3 * statistics.median(pair[k] for pair in pairs) for k in (0, 1))
    print(
        f"{name:30} {call:9.3f} {iteration:13.3f} {call / (3 * iteration + 0.3):12.2f} {left:8d} {grown:9.2f} "
        f"{1e3 * bound:10.0f} {1e3 * anew:10.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one algorithm, few calls: to see that it works")
    quick = parser.parse_args().quick
    print(f"JAX {jax.__version__} on {jax.devices()[0].platform}, {os.cpu_count()} cores")
    print(
        f"{'':30} {'call, ms':>9} {'iteration, ms':>13} {'of allowed':>12} {'arrays':>8} {'MB':>9} {'bind, ms':>10} "
        f"{'anew, ms':>10}   (allowed: {ALLOWED})"
    )
    small = fb.tasks.quadratic(clients=10)
    if quick:
        compare("AggITD", fb.AggITD(**STEPS, inner_rounds=1), small, fb.Simulation(), calls=20, blocks=1)
        return
    for name, algorithm in ALGORITHMS.items():
        compare(name, algorithm, small, fb.Simulation(), calls=1000, blocks=5)
    ridge = fb.tasks.hyper_representation(dataset="digits", clients=20)
    compare(
        "AggITD, network, 5 of 20",
        fb.AggITD(**STEPS, batch_size=16),
        ridge,
        fb.Simulation(cohort=5),
        calls=200,
        blocks=5,
    )
    compare("AggITD, Loopback", ALGORITHMS["AggITD"], small, fb.Loopback(), calls=20, blocks=3)


if __name__ == "__main__":
    main()
