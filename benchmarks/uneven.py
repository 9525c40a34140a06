"""Full batches of clients that differ much in size: memory and time, against the same rows dealt evenly.

    python benchmarks/uneven.py [--quick] [--rows ROWS] [--against PATH]

100 clients, of which a few are large; network 64-64-10 with `features`, AggITD (N = 5) and Lockstep, full batches. Every
measurement is a process of its own: what `solve` adds to its peak memory beyond the data, and the cpu time of an iteration.
With --against, the same of another checkout of the library, in turns (one that pads 100,000 rows a hundred times needs 28
GB: try --rows 10000).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

INPUTS, HIDDEN, CLASSES, SMALL = 64, 64, 10, 5
HERE = Path(__file__).resolve().parent


def counts(kind: str, rows: int) -> list[int]:
    """Rows of each of 100 clients: "one" or "four" large ones beside many of five, "Dirichlet" sizes, or all "even"."""
    if kind == "Dirichlet":
        share = np.random.default_rng(0).dirichlet(np.full(100, 0.1))
        return [max(1, round(float(part) * rows)) for part in share]
    large = {"one": 1, "four": 4, "even": 0}[kind]
    if not large:
        return [rows // 100] * 100
    return [rows // large] * large + [SMALL] * (100 - large)


def measure(kind: str, rows: int, name: str, cohort: int | None, client_batch: int | None, iterations: int) -> dict:
    """Of this process: MB that `solve` adds, cpu and wall milliseconds of an iteration (medians)."""
    import jax

    import fedbilevel as fb
    from fedbilevel.tasks.hyper_representation import InnerLoss, features, outer_loss
    from fedbilevel.tasks.network import layer

    draw = np.random.default_rng(0)
    make = lambda n: {
        "a": draw.normal(size=(n, INPUTS)).astype("f"),
        "label": draw.integers(0, CLASSES, n).astype("i4"),
    }
    sizes = counts(kind, rows)
    data = fb.FederatedData.stack([make(n) for n in sizes], [make(n) for n in sizes])
    x, y = layer(jax.random.key(1), INPUTS, HIDDEN), layer(jax.random.key(2), HIDDEN, CLASSES)
    steps = {"inner_lr": 0.01, "hessian_lr": 0.01, "outer_lr": 0.01, "local_steps": 5}
    alg = fb.AggITD(inner_rounds=5, **steps) if name == "AggITD" else fb.Lockstep(**steps)
    problem, engine = fb.Problem(InnerLoss(), outer_loss, features=features), fb.Simulation(cohort, client_batch)
    before = psutil.Process().memory_info().rss / 1e6
    key = jax.random.key(0)
    fb.solve(problem, data, alg, x, y, iterations=2, engine=engine, key=key)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    run = engine.bind(problem, data, alg, alg.init(x, y), key)
    carry = run.start(alg, alg.init(x, y))
    carry, _ = run.advance(alg, carry, 1, 1e10)
    spent = []
    for _ in range(iterations):
        begin = time.process_time(), time.perf_counter()
        carry, _ = run.advance(alg, carry, 1, 1e10)
        spent.append((time.process_time() - begin[0], time.perf_counter() - begin[1]))
    cpu, wall = (1e3 * statistics.median(part) for part in zip(*spent, strict=True))
    return {"memory": peak - before, "cpu": cpu, "wall": wall}


def child(source: Path, *settings: str | int | None) -> dict:
    """`measure` in a process that has the library from there."""
    code = f"import json, sys; sys.path.insert(0, {str(HERE)!r}); import uneven; " + (
        f"print(json.dumps(uneven.measure(*{settings!r})))"
    )
    environment = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows, one line: to see that it works")
    parser.add_argument(
        "--against", type=Path, help="another checkout of the library, whose time and memory to compare"
    )
    parser.add_argument("--rows", type=int, default=100_000, help="of all clients together, at each level")
    parser.add_argument("--lines", type=int, help="of the table, the first so many")
    parser.add_argument("--iterations", type=int, default=5)
    given = parser.parse_args()
    rows, iterations = (500, 1) if given.quick else (given.rows, given.iterations)
    lines = [("AggITD", "one", None, None), ("Lockstep", "one", None, None), ("Lockstep", "four", None, None),
             ("AggITD", "Dirichlet", None, None), ("AggITD", "one", 10, None), ("AggITD", "one", None, 10)]  # fmt: skip
    print(f"{'':40} {'MB':>7} {'cpu, ms':>9} | {'even: MB':>8} {'cpu, ms':>9} {'ratio':>6} | the other checkout")
    for name, kind, cohort, batch in lines[: 1 if given.quick else given.lines]:
        label = f"{name}, {kind}" + (f", cohort {cohort}" if cohort else "") + (f", {batch} at a time" if batch else "")
        here = HERE.parent / "src"
        ours = child(here, kind, rows, name, cohort, batch, iterations)
        even = child(here, "even", rows, name, cohort, batch, iterations)
        line = f"{label:40} {ours['memory']:7.0f} {ours['cpu']:9.1f} | {even['memory']:8.0f} {even['cpu']:9.1f} "
        line += f"{ours['cpu'] / even['cpu']:6.2f} |"
        if given.against:
            other = child(given.against / "src", kind, rows, name, cohort, batch, iterations)
            line += f" {other['memory']:.0f} MB, {other['cpu']:.1f} ms, {other['cpu'] / ours['cpu']:.1f} times"
        print(line, flush=True)


if __name__ == "__main__":
    main()
