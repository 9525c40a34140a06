"""What an accelerator gives: Lockstep and AggITD on MNIST's network and on a small CNN, on a GPU and on two CPU cores.

    python benchmarks/gpu.py [--quick]

Rows are random, of MNIST's shape; 10 of 100 clients, minibatches of 64. For each algorithm and
network, in a process of its own: iterations a second of the library (up to 64 in one program), of ONE
jitted program with the same oracle calls on rows that are already gathered, the share of the
device's peak that their floating-point operations come to (XLA's cost analysis; the peak is
measured by a large product in the same precision), and the most device memory. Then a few
iterations in the highest precision, with deterministic operations, twice on the GPU and once on the
CPU: the first two are to be equal to the bit, and the CPU's to float32 rounding. Without a GPU the
lines of the CPU are all there is. It takes less than four minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import fedbilevel as fb
from fedbilevel.algorithms.components.directions import hessian_factor, hypergradient, inner_gradient
from fedbilevel.algorithms.components.steps import controlled_descent, descend, fedsvrg
from fedbilevel.cohorts import client_key, exchange_key, sample_cohort
from fedbilevel.federation import Client
from fedbilevel.tasks.base import cross_entropy
from fedbilevel.tasks.network import hidden, layer

CLIENTS, COHORT, ROWS, SIDE, HIDDEN, BATCH, CLASSES = 100, 10, 300, 28, 200, 64, 10
QUICK = {"CLIENTS": 4, "COHORT": 2, "ROWS": 8, "SIDE": 8, "HIDDEN": 4, "BATCH": 4, "CLASSES": 3}
SECONDS, REPEATS, PRODUCT = 2.0, 3, {"cpu": 1536, "gpu": 8192}
QUICKLY = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}  # what is counted is not run
STEPS = {"inner_lr": 0.01, "hessian_lr": 0.01, "outer_lr": 0.01}


def convolved(x, image):
    """Two convolutions of stride 2 and a flattening: the body of the CNN."""
    step = functools.partial(jax.lax.conv_general_dilated, window_strides=(2, 2), padding="SAME",
                             dimension_numbers=("NHWC", "HWIO", "NHWC"))  # fmt: skip
    found = jax.nn.relu(step(image.reshape(1, SIDE, SIDE, 1), x["first"]))
    return jax.nn.relu(step(found, x["second"])).reshape(-1)


def network(name: str) -> tuple[fb.Problem, dict, dict]:
    """(Problem, x, y): a body and a head."""
    body = {"network": hidden, "cnn": convolved}[name]

    def outer(x, y, row):
        return cross_entropy(body(x, row["a"]) @ y["weight"] + y["bias"], row["label"])

    def inner(x, y, row):
        return outer(x, y, row) + 0.005 * sum(jnp.sum(leaf**2) for leaf in y.values())

    keys = jax.random.split(jax.random.key(1), 3)
    if name == "network":
        return fb.Problem(inner, outer), layer(keys[0], SIDE**2, HIDDEN), layer(keys[1], HIDDEN, CLASSES)
    kernel = lambda key, *shape: jax.random.normal(key, shape) / math.sqrt(math.prod(shape[:3]))
    x = {"first": kernel(keys[0], 3, 3, 1, 16), "second": kernel(keys[1], 3, 3, 16, 32)}
    return fb.Problem(inner, outer), x, layer(keys[2], 32 * (SIDE // 4) ** 2, CLASSES)


@dataclasses.dataclass(frozen=True)
class Case:
    """An algorithm on a network."""

    algorithm: str
    network: str

    def build(self):
        draw = np.random.default_rng(0)
        rows = lambda: {
            "a": draw.random((ROWS, SIDE**2)).astype("f"),
            "label": draw.integers(0, CLASSES, ROWS).astype("i4"),
        }
        data = fb.FederatedData.stack(*([rows() for _ in range(CLIENTS)] for _ in range(2)))
        problem, x, y = network(self.network)
        if self.algorithm == "Lockstep":
            return problem, data, fb.Lockstep(batch_size=BATCH, **STEPS), x, y
        # truncation=0: the vector rides along from the first turn on, in every iteration alike
        return problem, data, fb.AggITD(batch_size=BATCH, truncation=0, **STEPS), x, y


# One jitted program of the same oracle calls ----------------------------------------------------------------------------


def drawn(problem, data, key, counter, level, draws):
    """The rows of several draws of the cohort of an exchange, leaves (cohort, draws, ...)."""
    exchange = exchange_key(jax.random.fold_in(key, 0), counter)
    cohort = sample_cohort(exchange, CLIENTS, COHORT, None)

    def one(i):
        client = Client(problem, (data.inner.client(i), data.outer.client(i)), None, client_key(exchange, i), ())
        return jax.vmap(lambda draw: client.batch(level, BATCH, draw))(draws)

    return jax.vmap(one)(cohort)


def of(rows, s):
    """One draw of a client's."""
    return jax.tree.map(lambda leaf: leaf[s], rows)


def over(function, *rows):
    """The mean over the cohort."""
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), jax.vmap(function)(*rows))


def lockstep_rows(problem, data, alg, key):
    draw = lambda level, many: drawn(problem, data, key, 0, level, jnp.arange(many))
    return draw("inner", alg.local_steps + 1 + alg.outer_steps), draw("outer", alg.outer_steps + 1)


def lockstep(problem, alg, x, y, rows):
    """One iteration from the start, where v and all control variates are zero."""
    T, S, v = alg.local_steps, alg.outer_steps, jax.tree.map(jnp.zeros_like, y)

    def moves(inner, outer):
        along_x = lambda s: lambda z: hypergradient(problem, z, y, v, of(inner, T + 1 + s), of(outer, s))
        along_y = lambda s: inner_gradient(problem, x, of(inner, s))
        pull = problem.outer_gradients(x, y, of(outer, S))[1]
        adjoint = jax.tree.map(jnp.subtract, problem.hessian_vector(x, y, v, of(inner, T)), pull)
        first, zero = (along_x(0)(x), along_y(0)(y), adjoint), lambda like: jax.tree.map(jnp.zeros_like, like)
        ends = (
            controlled_descent(along_x, x, first[0], zero(x), alg.outer_lr, S),
            controlled_descent(along_y, y, first[1], zero(y), alg.inner_lr, T),
            descend(v, alg.hessian_lr, adjoint),
        )
        return ends, first

    (x, y, _), _ = over(moves, *rows)
    return x, y


def aggitd_rows(problem, data, alg, key):
    draw = functools.partial(drawn, problem, data, key)
    N, few = alg.inner_rounds, jnp.arange
    turn = lambda t: (draw(2 * t, "inner", few(2)), draw(2 * t, "outer", few(1)),
                      draw(2 * t + 1, "inner", few(alg.local_steps)))  # fmt: skip
    turns = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(turn, range(N)))
    ends = [(2 * N, "inner", few(2))]
    ends += [(2 * N + k, level, few(1)) for k in (1, 2) for level in ("inner", "outer")]
    last = [draw(*end) for end in ends]
    return turns, last


def aggitd(problem, alg, x, y, rows):
    """One iteration with Q = 0: the first turn begins the vector, each later one is a factor."""
    turns, (inner, h_inner, h_outer, u_inner, u_outer) = rows
    lam, N = alg.hessian_lr, alg.inner_rounds

    def factor(y, r, rows):
        return over(lambda rows: hessian_factor(problem, x, y, r, lam, of(rows, 1)), rows)

    def turn(t, loop):
        y, r = loop
        now = of(turns, t)
        q = over(lambda rows: problem.inner_gradient(x, y, of(rows, 0)), now[0])
        begin = lambda: over(lambda rows: problem.outer_gradients(x, y, of(rows, 0))[1], now[1])
        r = jax.lax.cond(t == 0, begin, lambda: factor(y, r, now[0]))
        local = lambda rows: fedsvrg(
            lambda s: inner_gradient(problem, x, of(rows, s)), y, q, alg.inner_lr, alg.local_steps
        )
        return over(local, now[2]), r

    y, r = jax.lax.fori_loop(0, N, turn, (y, jax.tree.map(jnp.zeros_like, y)))
    v = jax.tree.map(lambda leaf: lam * (N + 1) * leaf, factor(y, r, inner))
    along = lambda z, inner, outer: hypergradient(problem, z, y, v, of(inner, 0), of(outer, 0))
    h = over(lambda inner, outer: along(x, inner, outer), h_inner, h_outer)
    return over(lambda i, o: fedsvrg(lambda s: lambda z: along(z, i, o), x, h, alg.outer_lr, 1), u_inner, u_outer), y


BARE = {"Lockstep": (lockstep_rows, lockstep), "AggITD": (aggitd_rows, aggitd)}


def operations(function, *args) -> float:
    """Floating-point operations of a compiled program, whose loops are unrolled to be counted: XLA counts a turn once."""

    def unrolled(first, last, body, carry):
        for k in range(first, last):
            carry = body(k, carry)
        return carry

    loop, jax.lax.fori_loop = jax.lax.fori_loop, unrolled
    try:
        with jax.default_device(
            jax.devices("cpu")[0]
        ):  # on a GPU products are calls of a library, which XLA does not count
            shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args)
            cost = jax.jit(function).lower(*shapes).compile(QUICKLY).cost_analysis()
    finally:
        jax.lax.fori_loop = loop
    return float(cost["flops"])


# In a process of its own ------------------------------------------------------------------------------------------------


def timed(run) -> float:
    """Seconds of a call, the median of a few that take long enough; of a long one, the first after it is compiled."""
    run()
    begin = time.perf_counter()
    run()
    first = time.perf_counter() - begin
    if first > SECONDS:
        return first
    many = max(1, int(SECONDS / REPEATS / max(first, 1e-6)))
    found = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        for _ in range(many):
            run()
        found.append((time.perf_counter() - begin) / many)
    return statistics.median(found)


def measure(case: Case) -> dict:
    """The figures of a line."""
    problem, data, alg, x, y = case.build()
    key, state = jax.random.key(0), alg.init(x, y)
    execution = fb.Simulation(cohort=COHORT, compile="full").bind(problem, data, alg, state, key)
    start = execution.start(alg, state)
    gather, bare = BARE[case.algorithm]
    rows = jax.jit(functools.partial(gather, problem, data, alg))(key)
    function = functools.partial(bare, problem, alg)
    program = jax.jit(function)
    gap = _gap((execution.advance(alg, start, 1, np.inf)[0].state.x,), program(x, y, rows)[:1])
    theirs = timed(lambda: jax.block_until_ready(program(x, y, rows)))
    many = min(64, max(1, int(SECONDS / REPEATS / theirs)))
    ours = timed(lambda: execution.advance(alg, start, many, np.inf)) / many
    flops = operations(function, x, y, rows)
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return {"ours": 1 / ours, "bare": 1 / theirs, "share": flops / ours / _peak(device.platform), "gflop": flops / 1e9,
            "memory": memory, "gap": gap, "device": device.device_kind}  # fmt: skip


def _peak(platform: str) -> float:
    """Operations a second of a large product."""
    size = 256 if QUICK["ROWS"] == ROWS else PRODUCT.get(platform, 8192)
    product, a = jax.jit(jnp.matmul), jnp.ones((size, size))
    return 2 * size**3 / timed(lambda: jax.block_until_ready(product(a, a)))


def _gap(some, others) -> float:
    """The largest difference, against the largest number."""
    pairs = [
        (np.asarray(a, float), np.asarray(b, float))
        for a, b in zip(jax.tree.leaves(some), jax.tree.leaves(others), strict=True)
    ]
    return max(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30) for a, b in pairs)


def numbers(case: Case, iterations: int = 3) -> list[np.ndarray]:
    """x and y after a few iterations in the highest precision."""
    problem, data, alg, x, y = case.build()
    with jax.default_matmul_precision("highest"):
        result = fb.solve(problem, data, alg, x, y, iterations, key=jax.random.key(0), check=False,
                          engine=fb.Simulation(cohort=COHORT, compile="full"))  # fmt: skip
    return [np.asarray(leaf) for leaf in jax.tree.leaves((result.x, result.y))]


def child(part: str, case: Case | None, file: str | None) -> None:
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:2] if os.environ.get("JAX_PLATFORMS") == "cpu" else cores[2:] or cores)
    if part == "device":
        print(json.dumps(jax.default_backend()))
    elif part == "time" and case is not None:
        print(json.dumps(measure(case)))
    elif file is not None:
        twice = {f"{case.algorithm} {case.network} {k} {place}": leaf for case in cases() for k in range(2)
                 for place, leaf in enumerate(numbers(case))}  # fmt: skip
        np.savez(file, **twice)


# What starts them and prints ---------------------------------------------------------------------------------------------


def cases() -> list[Case]:
    networks = ["network"] if QUICK["ROWS"] == ROWS else ["network", "cnn"]
    return [Case(algorithm, name) for name in networks for algorithm in BARE]


def start(part: str, cpu: bool, quick: bool, case: Case | None = None, file: Path | None = None) -> dict | str | None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true" if part == "numbers" else None
    more = {"JAX_PLATFORMS": "cpu"} if cpu else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    words = [sys.executable, __file__, "--part", part, *(["--quick"] if quick else [])]
    words += ["--case", case.algorithm, case.network] if case else []
    words += ["--file", str(file)] if file else []
    environment = {**os.environ, **more, **({"XLA_FLAGS": flags.strip()} if flags else {})}
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout) if done.stdout.strip() else None


def lines(where: str, measured: list) -> dict[Case, float]:
    found = {}
    for case, line in zip(cases(), measured, strict=True):
        told = line.result()
        assert isinstance(told, dict)
        found[case] = told["ours"]
        memory = "not told" if told["memory"] is None else f"{told['memory'] / 1e6:.0f}"
        print(f"{case.algorithm:9} {case.network:8} {where:12} {told['ours']:13.1f} {told['bare']:10.1f} "
              f"{told['bare'] / told['ours']:11.3f} {told['gflop']:9.3f} {100 * told['share']:10.2f} {memory:>10} "
              f"{told['gap']:10.0e}", flush=True)  # fmt: skip
    return found


@contextlib.contextmanager
def side_by_side():
    """(What starts processes on two cores, what starts those on the GPU): at once, where there are cores for both."""
    with ThreadPoolExecutor(1) as cores:
        if (os.cpu_count() or 1) < 4:
            yield cores, cores
            return
        with ThreadPoolExecutor(1) as accelerator:
            yield cores, accelerator


def agreement(files: list[Path]) -> None:
    gpu, cpu = (dict(np.load(file)) for file in files)
    for case in cases():
        name = f"{case.algorithm} {case.network}"
        ours = [
            [value for key, value in of.items() if key.startswith(f"{name} {k} ")]
            for of, k in ((gpu, 0), (gpu, 1), (cpu, 0))
        ]
        same = all(np.array_equal(a, b) for a, b in zip(*ours[:2], strict=True))
        print(f"{name}: two runs on the GPU are {'equal to the bit' if same else 'NOT equal'}; "
              f"the CPU's differ by {_gap(ours[0], ours[2]):.1e}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network on the CPU alone: to see that it works")
    for word, many in (("--part", None), ("--case", 2), ("--file", None)):
        parser.add_argument(word, nargs=many, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick:
        globals().update(QUICK, SECONDS=0.02)
    if given.part:
        return child(given.part, Case(*given.case) if given.case else None, given.file)
    begin, gpu = time.perf_counter(), not given.quick and start("device", False, given.quick) == "gpu"
    print(f"{COHORT} of {CLIENTS} clients, minibatches of {BATCH}, images {SIDE} x {SIDE}, JAX {jax.__version__}")
    print(f"{'':9} {'':8} {'':12} {'iterations/s':>13} {'bare/s':>10} {'bare / ours':>11} {'GFLOP':>9} {'% of peak':>10} "
          f"{'memory, MB':>10} {'difference':>10}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, side_by_side() as (cores, accelerator):
        on_cores = [cores.submit(start, "time", True, given.quick, case) for case in cases()]
        if not gpu:
            lines("2 CPU cores", on_cores)
            print("There is no GPU here: these are the lines of the CPU alone.")
        else:
            on_gpu = [accelerator.submit(start, "time", False, given.quick, case) for case in cases()]
            files = [Path(folder) / f"{name}.npz" for name in ("gpu", "cpu")]
            made = [accelerator.submit(start, "numbers", False, given.quick, None, files[0]),
                    cores.submit(start, "numbers", True, given.quick, None, files[1])]  # fmt: skip
            slow, fast = lines("2 CPU cores", on_cores), lines("GPU", on_gpu)
            told = (f"{case.algorithm} {case.network} {rate / slow[case]:.1f}" for case, rate in fast.items())
            print(f"GPU over two CPU cores: {', '.join(told)}")
            [each.result() for each in made]
            agreement(files)
    print(f"{time.perf_counter() - begin:.1f} seconds in all, with compilation")


if __name__ == "__main__":
    main()
