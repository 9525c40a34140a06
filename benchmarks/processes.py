"""How the time of an iteration falls with processes and grows with clients, on this machine.

    python benchmarks/processes.py [--quick]

Each line is a launch of its own (`fedbilevel launch`); the processes share this machine's cores. Every client has 20 rows
of 64 numbers, which the process that owns it draws; y has 64 numbers. "everybody" is Lockstep with all clients and full
batches, computed where the rows lie; "cohort" is AggITD with 100 clients and minibatches of 16, whose rows travel. The
time of an iteration is the median of five stretches after compilation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS, NUMBERS = 20, 64


def measure(out: str, clients: int, iterations: int) -> None:
    """What one of the processes does; process 0 leaves its figures."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import fedbilevel as fb

    mesh = fb.processes.join()

    def load(client):
        draw = np.random.default_rng(client)
        level = lambda: {"a": draw.normal(size=(ROWS, NUMBERS)).astype("f"), "b": draw.normal(size=ROWS).astype("f")}
        return level(), level()

    def inner(x, y, row):
        return 0.5 * (row["a"] @ y - row["b"]) ** 2 + 0.5 * jnp.exp(x) * (y @ y)

    def outer(x, y, row):
        return 0.5 * (row["a"] @ y - row["b"]) ** 2

    begin = time.perf_counter()
    data = fb.load_clients(load, clients, mesh=mesh)
    found = {"load": time.perf_counter() - begin}
    runs = {
        "everybody": (fb.Lockstep(inner_lr=0.01, hessian_lr=0.01, outer_lr=0.01), None),
        "cohort": (fb.AggITD(inner_lr=0.01, hessian_lr=0.01, outer_lr=0.01, batch_size=16), min(100, clients)),
    }
    x, y = jnp.zeros(()), jnp.zeros(NUMBERS)
    for name, (algorithm, cohort) in runs.items():
        engine = fb.Simulation(cohort, mesh=mesh, compile="full")
        run = engine.bind(fb.Problem(inner, outer), data, algorithm, algorithm.init(x, y), jax.random.key(0))
        carry, record = run.advance(algorithm, run.start(algorithm, algorithm.init(x, y)), 1, 1e10)
        times = []
        for _ in range(5):
            carry, record = run.advance(algorithm, carry, iterations, 1e10)
            times.append(record.seconds / iterations)
        found[name] = statistics.median(times)
    if jax.process_index() == 0:
        Path(out).write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two processes and few clients: whether it runs")
    parser.add_argument("--worker", nargs=3)
    options = parser.parse_args()
    if options.worker:
        out, clients, iterations = options.worker
        return measure(out, int(clients), int(iterations))
    sizes = [(2, 20, 2)] if options.quick else [(p, m, 5) for m in (100, 1000, 10000) for p in (1, 2, 4)]
    print("processes  clients    load, s   everybody, ms   cohort of 100, ms")
    for processes, clients, iterations in sizes:
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "figures.json"
            launch = ["-m", "fedbilevel", "launch", "--processes", str(processes)]
            words = [__file__, "--worker", str(out), str(clients), str(iterations)]
            subprocess.run([sys.executable, *launch, *words], check=True, stdout=subprocess.DEVNULL)
            found = json.loads(out.read_text())
        print(
            f"{processes:9}{clients:9,}{found['load']:11.2f}{1e3 * found['everybody']:16.2f}{1e3 * found['cohort']:20.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
