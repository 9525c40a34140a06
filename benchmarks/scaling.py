"""How compilation, time and memory grow: with the rounds of an iteration, the clients, the cohort, and the iterations.

    python benchmarks/scaling.py [--quick]

Every line is a process of its own, so that peak memory is its own; the time of an iteration is the median of 20 after
compilation. AggITD on hyper-representation (64-64-10), 20 inner and 10 outer rows a client, minibatches of 16.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import psutil

ROWS, INPUTS, HIDDEN, CLASSES = 30, 64, 64, 10


def measure(clients: int, cohort: int, client_batch: int | None, rounds: int, iterations: int) -> dict:
    """Seconds to compile, median seconds of an iteration, peak and data memory in MB, of this process."""
    import jax
    import numpy as np

    import fedbilevel as fb
    from fedbilevel.tasks.hyper_representation import InnerLoss, features, outer_loss
    from fedbilevel.tasks.network import layer

    draw = np.random.default_rng(0)
    rows = {
        "a": draw.normal(size=(clients, ROWS, INPUTS)).astype("f"),
        "label": draw.integers(0, CLASSES, (clients, ROWS)).astype("i4"),
    }
    part = lambda level: [jax.tree.map(lambda a, i=i: a[i][level], rows) for i in range(clients)]
    data = fb.FederatedData.stack(part(slice(0, 20)), part(slice(20, ROWS)))
    megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(data)) / 1e6
    x, y = layer(jax.random.key(1), INPUTS, HIDDEN), layer(jax.random.key(2), HIDDEN, CLASSES)
    alg = fb.AggITD(inner_rounds=rounds, local_steps=2, outer_steps=2, batch_size=16, outer_lr=0.01)
    begin = time.perf_counter()
    problem = fb.Problem(InnerLoss(), outer_loss, features=features)
    run = fb.Simulation(cohort=cohort, client_batch=client_batch).bind(
        problem, data, alg, alg.init(x, y), jax.random.key(0)
    )
    traced = time.perf_counter() - begin
    carry = run.start(alg, alg.init(x, y))
    begin = time.perf_counter()
    run.advance(alg, carry, 0, 1e10)
    compiled = time.perf_counter() - begin
    times = []
    for _ in range(20):
        carry, record = run.advance(alg, carry, 1, 1e10)
        times.append(record.seconds)
    before = _resident()
    if iterations:
        for _ in range(iterations // 100):
            carry, record = run.advance(alg, carry, 100, 1e10)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"trace": traced, "compile": compiled, "iteration": statistics.median(times), "peak": peak, "data": megabytes,
            "grown": _resident() - before}  # fmt: skip


def _resident() -> float:
    """Resident memory now, MB."""
    return psutil.Process().memory_info().rss / 1e6


def line(label: str, **settings) -> None:
    imports = f"import json, sys; sys.path.insert(0, {sys.path[0]!r}); import scaling"
    code = f"{imports}; print(json.dumps(scaling.measure(**{settings!r})))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    m = json.loads(out.splitlines()[-1])
    print(
        f"{label:44} {m['trace']:7.2f} {m['compile']:9.2f} {1e3 * m['iteration']:12.2f} {m['peak']:8.0f} "
        f"{m['data']:8.1f} {m['grown']:8.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one line, few clients: to see that it works")
    quick = parser.parse_args().quick
    base = {"clients": 100, "cohort": 10, "client_batch": None, "rounds": 5, "iterations": 0}
    print(f"{'':44} {'trace s':>7} {'compile s':>9} {'iteration ms':>12} {'peak MB':>8} {'data MB':>8} {'grown MB':>8}")
    if quick:
        return line("4 clients, cohort 2", clients=4, cohort=2, client_batch=None, rounds=2, iterations=100)
    for rounds in (5, 50, 200):
        line(f"N = {rounds}", **{**base, "rounds": rounds})
    for clients in (100, 1_000, 10_000):
        line(f"{clients:,} clients, cohort 10", **{**base, "clients": clients})
    for cohort, batch in ((10, None), (100, None), (1_000, None), (1_000, 100), (1_000, 10)):
        line(
            f"1,000 clients, cohort {cohort:,}" + (f", client_batch {batch}" if batch else ""),
            **{**base, "clients": 1_000, "cohort": cohort, "client_batch": batch},
        )
    line("2,000 iterations more", **{**base, "iterations": 2_000})


if __name__ == "__main__":
    main()
