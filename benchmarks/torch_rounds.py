"""A round of Lockstep and an iteration of AggITD on a problem in PyTorch, against plain PyTorch loops.

    python benchmarks/torch_rounds.py [--quick]

An MLP (784-64-10) and a CNN (two convolutions with GroupNorm, 28x28), 20 clients of 200 rows, a cohort of 5, batches of 32;
x: class weights and a penalty. The plain loops make the same oracle calls: clients one by one (each with its own
`torch.autograd.grad`), and all of a cohort in one call of `torch.vmap`. A process for each line and number of torch's
threads; wall and cpu time of a round in ms: of a loop the median of 50 after 10, of ours a 50th of what 50 more rounds add
to a run of 10 (compiled in full, the median of three). "ratio" is ours over the faster loop. Memory is the process's peak
beyond what its imports take, over that of the loop clients one by one. AggITD on the CNN has 10 instead of 50.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

CLIENTS, ROWS, COHORT, BATCH, STEPS, TURNS = 20, 200, 5, 32, 5, 5
WARM, TIMED = 10, 50
LR, OUTER_LR, LAM = 1e-2, 1e-2, 1e-2
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
        + " ".join(f"{kind:>21}" for kind in KINDS)
        + " | ratio wall cpu memory"
    )
    print(" " * 24 + "| " + " ".join(f"{'wall   cpu ms    MB':>21}" for _ in KINDS))
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
    shown = " ".join(f"{one['wall']:7.2f} {one['cpu']:6.2f} {one['mb']:6.0f}" for one in found.values())
    return (
        f"{model:5} {algorithm:9} {threads:7} | {shown} | {ours['wall'] / best['wall']:10.2f} "
        f"{ours['cpu'] / min(one['cpu'] for one in plain):.2f} {ours['mb'] / found['one by one']['mb']:.2f}"
    )


def measured(kind: str, model: str, algorithm: str, threads: int, quick: bool) -> dict[str, float]:
    """Medians of a round (iteration): wall and cpu, ms; and the peak of memory, MB."""
    import torch

    torch.set_num_threads(threads)
    if kind == "ours":
        import jax.numpy as jnp

        import fedbilevel.torch

        jnp.ones(3).block_until_ready()
        fedbilevel.torch.Problem  # noqa: B018  it is imported
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    warm, timed = (2, 3) if quick else (WARM, 10 if (model, algorithm) == ("cnn", "aggitd") else TIMED)
    wall, cpu = (ours if kind == "ours" else loop)(model, algorithm, kind, warm, timed)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"wall": 1e3 * wall, "cpu": 1e3 * cpu, "mb": peak}


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


# The problem --------------------------------------------------------------------------------------------------------------


def problem(model: str):
    """(inner, outer, x, y, rows of each client at each level)."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.manual_seed(0)
    norm = lambda channels: [nn.GroupNorm(4, channels), nn.ReLU(), nn.MaxPool2d(2)]
    module = {
        "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)),
        "cnn": lambda: nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), *norm(16), nn.Conv2d(16, 32, 3, padding=1), *norm(32), nn.Flatten(),
            nn.Linear(32 * 49, 10),
        ),
    }[model]()  # fmt: skip
    y = {name: one.detach().clone() for name, one in module.named_parameters()}
    x = {"weights": torch.zeros(10), "penalty": torch.tensor(-6.0)}

    def inner(x, y, batch, weights):
        image, label = batch
        each = F.cross_entropy(torch.func.functional_call(module, y, (image,)), label, reduction="none")
        decay = sum((leaf**2).sum() for leaf in y.values())
        return (weights * torch.exp(x["weights"])[label] * each).sum() + torch.exp(x["penalty"]) * decay

    def outer(x, y, batch, weights):
        image, label = batch
        each = F.cross_entropy(torch.func.functional_call(module, y, (image,)), label, reduction="none")
        return (weights * each).sum()

    draw = np.random.default_rng(0)
    client = lambda: (draw.standard_normal((ROWS, 1, 28, 28), np.float32), draw.integers(0, 10, ROWS))
    levels = [[client() for _ in range(CLIENTS)] for _ in range(2)]
    return inner, outer, x, y, levels


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


# The plain loops ----------------------------------------------------------------------------------------------------------


def plain(model: str, algorithm: str, kind: str) -> Callable[[int], None]:
    import torch

    inner, outer, x, y, levels = problem(model)
    rows = [[tuple(map(torch.from_numpy, one)) for one in level] for level in levels]
    weights = torch.full((BATCH,), 1 / BATCH)
    oracles = (OneByOne if kind == "one by one" else Together)(inner, outer, weights)
    draw = torch.Generator().manual_seed(0)
    make = {"lockstep": Lockstep, "aggitd": AggITD}[algorithm]
    server = make(oracles, x, y)

    def turn(_: int) -> None:
        with torch.no_grad():
            server.turn(lambda cohort, level: oracles.batch(rows[level], cohort, draw), draw)

    return turn


class OneByOne:
    """Oracles of one client at a time; a cohort is a list."""

    def __init__(self, inner, outer, weights):
        self.inner, self.outer, self.weights = inner, outer, weights

    def each(self, method, cohort, *args):
        """The replies of a cohort, each by itself."""
        return mean([method([client], *args) for client in cohort])

    def batch(self, rows, cohort, draw):
        import torch

        place = torch.randint(ROWS, (BATCH,), generator=draw)
        return tuple(leaf[place] for leaf in rows[cohort[0]])

    def gradient(self, loss, x, y, batch, wrt, graph=False):
        import torch

        with torch.enable_grad():
            x, y = (
                {n: leaf.detach().requires_grad_(name in wrt) for n, leaf in tree.items()}
                for name, tree in (("x", x), ("y", y))
            )
            of = [*(x.values() if "x" in wrt else ()), *(y.values() if "y" in wrt else ())]
            found = torch.autograd.grad(loss(x, y, batch, self.weights), of, allow_unused=True)
        found = [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(of, found, strict=True)]
        split = len(x) if "x" in wrt else 0
        return dict(zip(x, found[:split], strict=False)), dict(zip(y, found[split:], strict=False))

    def inner_gradient(self, x, y, batch):
        return self.gradient(self.inner, x, y, batch, "y")[1]

    def outer_gradients(self, x, y, batch):
        return self.gradient(self.outer, x, y, batch, "xy")

    def product(self, x, y, v, batch, of):
        import torch

        with torch.enable_grad():
            x = {n: leaf.detach().requires_grad_(of == "x") for n, leaf in x.items()}
            y = {n: leaf.detach().requires_grad_() for n, leaf in y.items()}
            slopes = torch.autograd.grad(self.inner(x, y, batch, self.weights), list(y.values()), create_graph=True)
            wrt = x if of == "x" else y
            found = torch.autograd.grad(slopes, list(wrt.values()), [v[n] for n in y], allow_unused=True)
        return {
            n: torch.zeros_like(leaf) if one is None else one for (n, leaf), one in zip(wrt.items(), found, strict=True)
        }


class Together(OneByOne):
    """Oracles of a cohort at once, by `torch.vmap`; every leaf has an axis of clients first."""

    def each(self, method, cohort, *args):

        wide = lambda tree: {n: leaf.expand(COHORT, *leaf.shape) for n, leaf in tree.items()}
        out = method(cohort, *map(wide, args))
        narrow = lambda tree: {n: leaf.mean(0) for n, leaf in tree.items()}
        return tuple(map(narrow, out)) if isinstance(out, tuple) else narrow(out)

    def batch(self, rows, cohort, draw):
        import torch

        places = [torch.randint(ROWS, (BATCH,), generator=draw) for _ in cohort]
        picked = [tuple(leaf[place] for leaf in rows[client]) for client, place in zip(cohort, places, strict=True)]
        return tuple(torch.stack(leaves) for leaves in zip(*picked, strict=True))

    def inner_gradient(self, x, y, batch):
        import torch

        return torch.vmap(torch.func.grad(lambda y, x, b: self.inner(x, y, b, self.weights)))(y, x, batch)

    def outer_gradients(self, x, y, batch):
        import torch

        return torch.vmap(torch.func.grad(lambda x, y, b: self.outer(x, y, b, self.weights), argnums=(0, 1)))(
            x, y, batch
        )

    def product(self, x, y, v, batch, of):
        import torch
        from torch.func import grad

        def along(x, y, v, b):
            slopes = grad(lambda y: self.inner(x, y, b, self.weights))(y)
            return sum((slopes[n] * v[n]).sum() for n in slopes)

        return torch.vmap(grad(along, argnums=0 if of == "x" else 1))(x, y, v, batch)


def step(tree, lr, *directions):
    return {n: leaf - lr * sum(d[n] for d in directions) for n, leaf in tree.items()}


def minus(a, b):
    return {n: leaf - b[n] for n, leaf in a.items()}


def mean(replies):
    if isinstance(replies[0], tuple):
        return tuple(mean([reply[k] for reply in replies]) for k in range(len(replies[0])))
    return {n: sum(reply[n] for reply in replies) / len(replies) for n in replies[0]}


class Lockstep:
    """One round: five steps on y, one on x and one on v, each with its control variate."""

    def __init__(self, oracles, x, y):
        import torch

        zeros = lambda tree: {n: torch.zeros_like(leaf) for n, leaf in tree.items()}
        self.o, self.x, self.y, self.v = oracles, x, y, zeros(y)
        self.c = [zeros(x), zeros(y), zeros(y)]
        self.kept = [[zeros(x), zeros(y), zeros(y)] for _ in range(CLIENTS)]

    def turn(self, batch, draw):
        import torch

        cohort = torch.randperm(CLIENTS, generator=draw)[:COHORT].tolist()

        def moves(clients, x, y, v, cx, cy, cv):
            o = self.o
            if isinstance(o, Together):
                kept = [{n: torch.stack([self.kept[i][k][n] for i in clients]) for n in self.c[k]} for k in range(3)]
            else:
                kept = self.kept[clients[0]]
            inner, outer = (lambda: batch(clients, 0)), (lambda: batch(clients, 1))
            pull = o.outer_gradients(x, y, outer())[1]
            adjoint = minus(o.product(x, y, v, inner(), "y"), pull)
            direct = o.outer_gradients(x, y, outer())[0]
            along_x, along_y = minus(direct, o.product(x, y, v, inner(), "x")), o.inner_gradient(x, y, inner())
            fix = [minus(c, k) for c, k in zip((cx, cy, cv), kept, strict=True)]
            z = step(y, LR, along_y, fix[1])
            for _ in range(STEPS - 1):
                z = step(z, LR, o.inner_gradient(x, z, inner()), fix[1])
            ends = step(x, OUTER_LR, along_x, fix[0]), z, step(v, LAM, adjoint, fix[2])
            a = [along_x, along_y, adjoint]
            if isinstance(o, Together):
                for place, i in enumerate(clients):
                    self.kept[i] = [{n: leaf[place] for n, leaf in tree.items()} for tree in a]
            else:
                self.kept[clients[0]] = a
            moved = [minus(end, start) for end, start in zip(ends, (x, y, v), strict=True)]
            return (*moved, *(minus(one, k) for one, k in zip(a, kept, strict=True)))

        *moved, dx, dy, dv = self.o.each(moves, cohort, self.x, self.y, self.v, *self.c)
        self.x, self.y, self.v = (step(z, -1, m) for z, m in zip((self.x, self.y, self.v), moved, strict=True))
        self.c = [step(c, -COHORT / CLIENTS, d) for c, d in zip(self.c, (dx, dy, dv), strict=True)]


class AggITD:
    """N turns of two rounds (a gradient with a term of the series; FedSVRG steps), the vector, its hypergradient, a step."""

    def __init__(self, oracles, x, y):
        self.o, self.x, self.y = oracles, x, y

    def turn(self, batch, draw):
        import torch

        o, r = self.o, None
        cohort = lambda: torch.randperm(CLIENTS, generator=draw)[:COHORT].tolist()

        def vector(clients, x, y, *r):
            pull = o.outer_gradients(x, y, batch(clients, 1))[1]
            if not r:
                return pull
            product = o.product(x, y, r[0], batch(clients, 0), "y")
            return step(r[0], -1, minus(pull, {n: LAM * leaf for n, leaf in product.items()}))

        def anchor(clients, x, y, *r):
            return o.inner_gradient(x, y, batch(clients, 0)), vector(clients, x, y, *r)

        def lower(clients, x, y, q):
            z = step(y, LR, q)
            for _ in range(STEPS - 1):
                rows = batch(clients, 0)
                z = step(z, LR, minus(o.inner_gradient(x, z, rows), o.inner_gradient(x, y, rows)), q)
            return z

        for _ in range(TURNS):
            q, r = o.each(anchor, cohort(), self.x, self.y, *([] if r is None else [r]))
            self.y = o.each(lower, cohort(), self.x, self.y, q)
        r = o.each(vector, cohort(), self.x, self.y, r)
        v = {n: LAM * leaf for n, leaf in r.items()}

        def upper(clients, x, y, v):
            direct = o.outer_gradients(x, y, batch(clients, 1))[0]
            return minus(direct, o.product(x, y, v, batch(clients, 0), "x"))

        h = o.each(upper, cohort(), self.x, self.y, v)
        self.x = o.each(lambda clients, x, h: step(x, OUTER_LR, h), cohort(), self.x, h)


if __name__ == "__main__":
    main()
