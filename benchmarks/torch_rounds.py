"""A round of Lockstep and an iteration of AggITD on a problem in PyTorch, against plain PyTorch loops.

    python benchmarks/torch_rounds.py [--quick]

An MLP (784-64-10) and a CNN (two convolutions with GroupNorm, 28x28), 20 clients of 200 rows, a cohort of 5, batches of 32;
x: class weights and a penalty. The plain loops make the same oracle calls: clients one by one (each with its own
`torch.autograd.grad`), and all of a cohort in one call of `torch.vmap`. A process for each line and number of torch's
threads; wall and cpu time of a round in ms: of a loop the median of 50 after 10, of ours a 50th of what 50 more rounds add
to a run of 10 (compiled in full, the median of three). "ratio" is ours over the faster loop. Memory is the process's, beyond
what its imports take: its peak, and what it holds after the rounds; the ratios are those over the loop clients one by one.
The caller of ours drops its own rows when they are stacked (25 MB). AggITD on the CNN has 10 instead of 50.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
import psutil
from plain_torch.loops import plain
from plain_torch.problem import BATCH, COHORT, LAM, LR, OUTER_LR, STEPS, TURNS, problem

WARM, TIMED = 10, 50
KINDS = ("ours", "one by one", "vmap")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds of one line, to see that it works")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # kind, model, algorithm, threads
    given = parser.parse_args()
    if given.one:
        kind, model, algorithm, threads = given.one
        print(json.dumps(measured(kind, model, algorithm, int(threads), given.quick)))
        return
    print(
        f"{'model':5} {'algorithm':9} {'threads':>7} | "
        + " ".join(f"{kind:>26}" for kind in KINDS)
        + " | ratio wall  cpu peak held"
    )
    print(" " * 24 + "| " + " ".join(f"{'wall    cpu peak held':>26}" for _ in KINDS))
    for model in ("mlp",) if given.quick else ("mlp", "cnn"):
        for algorithm in ("lockstep",) if given.quick else ("lockstep", "aggitd"):
            for threads in (1,) if given.quick else (1, 2):
                print(line(model, algorithm, threads, given.quick), flush=True)


def line(model: str, algorithm: str, threads: int, quick: bool) -> str:
    found = {}
    for kind in KINDS:
        words = [sys.executable, __file__, "--one", kind, model, algorithm, str(threads), *["--quick"] * quick]
        found[kind] = json.loads(
            subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
    ours, plain = found["ours"], [found["one by one"], found["vmap"]]
    best = min(plain, key=lambda one: one["wall"])
    shown = " ".join(
        f"{one['wall']:8.2f} {one['cpu']:7.2f} {one['peak']:4.0f} {one['held']:4.0f}" for one in found.values()
    )
    more = lambda kind: ours[kind] / found["one by one"][kind]
    return (
        f"{model:5} {algorithm:9} {threads:7} | {shown} | {ours['wall'] / best['wall']:10.2f} "
        f"{ours['cpu'] / min(one['cpu'] for one in plain):.2f} {more('peak'):.2f} {more('held'):.2f}"
    )


def measured(kind: str, model: str, algorithm: str, threads: int, quick: bool) -> dict[str, float]:
    """Medians of a round (iteration): wall and cpu, ms; memory: its peak, and what is held at the end, MB."""
    import torch

    torch.set_num_threads(threads)
    if kind == "ours":
        import jax.numpy as jnp

        import fedbilevel.torch

        jnp.ones(3).block_until_ready()
        fedbilevel.torch.Problem  # noqa: B018  it is imported
    before = memory()
    warm, timed = (2, 3) if quick else (WARM, 10 if (model, algorithm) == ("cnn", "aggitd") else TIMED)
    wall, cpu = (ours if kind == "ours" else loop)(model, algorithm, kind, warm, timed)
    peak, held = (after - least for after, least in zip(memory(), before, strict=True))
    return {"wall": 1e3 * wall, "cpu": 1e3 * cpu, "peak": peak, "held": held}


def memory() -> tuple[float, float]:
    """(The most that this process has held, what it holds), MB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return most, psutil.Process().memory_info().rss / 2**20


def loop(model: str, algorithm: str, kind: str, warm: int, timed: int) -> tuple[float, float]:
    """Seconds of a turn of a plain loop, wall and cpu."""
    turn = plain(model, algorithm, kind)
    spent = []
    for k in range(warm + timed):
        begin = time.perf_counter(), time.process_time()
        turn(k)
        spent.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    wall, cpu = np.median(spent[warm:], axis=0)
    return float(wall), float(cpu)


def ours(model: str, algorithm: str, _: str, warm: int, timed: int) -> tuple[float, float]:
    """Seconds of an iteration of a run, wall and cpu."""
    import jax
    import torch
    from torch.utils.data import TensorDataset

    import fedbilevel as fb
    import fedbilevel.torch as ft

    inner, outer, x, y, levels = problem(model)
    tensors = [[TensorDataset(*map(torch.from_numpy, rows)) for rows in level] for level in levels]
    data = fb.FederatedData.stack(*tensors)
    del levels, tensors
    steps = {"inner_lr": LR, "outer_lr": OUTER_LR, "hessian_lr": LAM, "local_steps": STEPS, "batch_size": BATCH}
    kinds = {
        "lockstep": lambda: fb.Lockstep(**steps),
        "aggitd": lambda: fb.AggITD(inner_rounds=TURNS, truncation="full", **steps),
    }
    given = ft.Problem(inner, outer), data, kinds[algorithm](), x, y
    how = {"key": jax.random.key(0), "engine": fb.Simulation(cohort=COHORT, compile="full"), "check": False}

    def run(iterations: int) -> np.ndarray:
        begin = time.process_time()
        result = fb.solve(*given, iterations, evaluate_every=iterations, **how)
        return np.array([result.seconds, time.process_time() - begin])

    run(1)
    wall, cpu = np.median([run(warm + timed) - run(warm) for _ in range(3)], axis=0) / timed
    return float(wall), float(cpu)


if __name__ == "__main__":
    main()
