"""How time and memory grow: with clients, with one large client, and with an iteration's rounds and cohort.

    python benchmarks/scaling.py [--quick] [--against PATH] [--turns TURNS] [--only PART]

Every measurement is a process of its own, so that peak memory is its own; times are cpu times of that process. A line is
the median of five processes. With --against, the same of another checkout of the library in turns, and what ours takes of
its time; where that would take minutes the other is measured at a smaller size, which is said.

- building: `FederatedData.stack` and `split` of clients of five rows, cpu time a client
- clients: an iteration of Lockstep and AggITD, cohort 100, multinomial regression with a penalty for each of 20 features,
  five rows a client, 5,000 iterations of `solve`; peak memory over that of rows and clients' states
- uneven: one client of 100,000 rows beside 99 of five against the same rows dealt evenly, full batches (`uneven.py`)
- network: AggITD on hyper-representation (64-64-10), 20 inner and 10 outer rows a client, minibatches of 16
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil

ROWS, INPUTS, HIDDEN, CLASSES = 30, 64, 64, 10
FEATURES, KINDS, COHORT = 20, 3, 100
HERE = Path(__file__).resolve().parent
FORMS = ("list of dicts", "list of tuples", "by name", "one array")


def build(how: str, form: str, clients: int) -> dict[str, float]:
    """Microseconds of cpu time a client that `stack` or `split` takes."""
    import jax
    import numpy as np

    import fedbilevel as fb

    a = np.random.default_rng(0).normal(size=(clients, 5, FEATURES)).astype("f")
    label = np.arange(5 * clients, dtype="i4").reshape(clients, 5)
    rows = {
        "list of dicts": lambda: [{"a": a[i], "label": label[i]} for i in range(clients)],
        "list of tuples": lambda: list(zip(a, label, strict=True)),
        "by name": lambda: {f"site {i}": {"a": a[i], "label": label[i]} for i in range(clients)},
        "one array": lambda: a,
    }[form]()
    first = dict(list(rows.items())[:2]) if isinstance(rows, dict) else rows[:2]
    calls = {
        "stack": lambda rows: fb.FederatedData.stack(rows, rows, weights="rows"),
        "split": lambda rows: fb.FederatedData.split(rows, 0.4, jax.random.key(0)),
    }
    calls[how](first)  # what is loaded and compiled once
    begin = time.process_time()
    data = calls[how](rows)
    spent = time.process_time() - begin
    assert data.clients == clients
    return {"us": 1e6 * spent / clients}


def grow(name: str, clients: int, iterations: int) -> dict[str, float]:
    """Milliseconds of an iteration of `solve`, and MB: at most beyond importing, of rows and clients' states."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import fedbilevel as fb
    from fedbilevel.tasks.regularisation import inner_loss, outer_loss

    row = lambda e: {"a": e[:-1], "label": e[-1].astype(jnp.int32)}
    inner, outer = (lambda x, y, e, loss=loss: loss(x, y, row(e)) for loss in (inner_loss, outer_loss))
    before = _resident()
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((clients, 5, FEATURES + 1), np.float32)
    rows[..., -1] = draw.integers(0, KINDS, (clients, 5))
    data = fb.FederatedData.stack(rows[:, :3], rows[:, 3:])
    del rows
    steps = {"inner_lr": 0.01, "hessian_lr": 0.01, "outer_lr": 0.001, "local_steps": 5}
    alg = fb.AggITD(inner_rounds=5, **steps) if name == "AggITD" else fb.Lockstep(**steps)
    x, y = jnp.zeros(FEATURES), {"weight": jnp.zeros((FEATURES, KINDS)), "bias": jnp.zeros(KINDS)}
    known = {"compile": "full"} if "compile" in inspect.signature(fb.Simulation).parameters else {}
    settings = {"engine": fb.Simulation(cohort=COHORT, **known), "key": jax.random.key(0), "evaluate_every": 100}
    solve = lambda count: fb.solve(fb.Problem(inner, outer), data, alg, x, y, iterations=count, **settings)
    warnings.simplefilter("ignore")  # how much the clients' states need is what this measures
    solve(1)
    spent = []
    for count in (1, iterations + 1):
        begin = time.process_time()
        result = solve(count)
        spent.append(time.process_time() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before
    state = 4 * clients * (FEATURES + 2 * KINDS * (FEATURES + 1)) if name == "Lockstep" else 0
    held = (sum(leaf.nbytes for leaf in jax.tree.leaves(data)) + state) / 1e6
    wall = result.history[-1]["seconds"] / (iterations + 1)
    return {"cpu": 1e3 * (spent[1] - spent[0]) / iterations, "wall": 1e3 * wall, "peak": peak, "held": held}


def network(clients: int, cohort: int, client_batch: int | None, rounds: int, iterations: int) -> dict[str, float]:
    """Seconds to compile, milliseconds of an iteration (median of 20), peak and data memory in MB."""
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
    steps = {"inner_lr": 0.01, "hessian_lr": 0.01, "outer_lr": 0.01}
    alg = fb.AggITD(inner_rounds=rounds, local_steps=2, outer_steps=2, batch_size=16, **steps)
    begin = time.process_time()
    problem = fb.Problem(InnerLoss(), outer_loss, features=features)
    run = fb.Simulation(cohort=cohort, client_batch=client_batch).bind(
        problem, data, alg, alg.init(x, y), jax.random.key(0)
    )
    traced = time.process_time() - begin
    carry = run.start(alg, alg.init(x, y))
    begin = time.process_time()
    run.advance(alg, carry, 0, 1e10)
    compiled = time.process_time() - begin
    times = []
    for _ in range(20):
        begin = time.process_time()
        carry, _ = run.advance(alg, carry, 1, 1e10)
        times.append(1e3 * (time.process_time() - begin))
    before = _resident()
    for _ in range(iterations // 100):
        carry, _ = run.advance(alg, carry, 100, 1e10)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"trace": traced, "compile": compiled, "iteration": statistics.median(times), "peak": peak, "data": megabytes,
            "grown": _resident() - before}  # fmt: skip


def _resident() -> float:
    """Resident memory now, MB."""
    return psutil.Process().memory_info().rss / 1e6


class Turns:
    """Measurements of this library and of another checkout, in turns.

    Args:
        other: where the other one's sources are; None: there is none.
        count: how often each is measured.
    """

    def __init__(self, other: Path | None, count: int):
        self.other, self.count = other, count

    def __call__(self, function: str, *ours: str | int | None, theirs: tuple | None = None) -> tuple[dict, dict | None]:
        """Medians of ours, and of the other's (None where it is not measured).

        Args:
            function: `build`, `grow`, `network`, or one of `uneven`.
            ours: its arguments.
            theirs: those of the other one; None: it is not measured.
        """
        mine, others = [], []
        for _ in range(self.count):
            mine.append(_child(HERE.parent / "src", function, ours))
            if self.other is not None and theirs is not None:
                others.append(_child(self.other, function, theirs))
        return _medians(mine), _medians(others) if others else None


def _child(source: Path, function: str, settings: tuple) -> dict[str, float]:
    """A measurement in a process that has the library from there, and compiles anew."""
    module, _, name = function.rpartition(".")
    code = f"import json, sys; sys.path.insert(0, {str(HERE)!r}); import {module or 'scaling'} as own; "
    environment = {**os.environ, "PYTHONPATH": str(source), "FEDBILEVEL_CACHE": "off"}
    words = [sys.executable, "-c", code + f"print(json.dumps(own.{name}(*{settings!r})))"]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def _medians(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def _building(turns: Turns, quick: bool) -> None:
    clients, few = (2_000, 200) if quick else (1_000_000, 2_000)
    print(f"\nbuilding: {clients:,} clients of five rows (the other checkout: {few:,}, in a list of dicts)")
    print(f"{'':28} {'us a client':>11} {'all, s':>8} | {'other, us':>9} {'ours of it':>10}")
    for how, form in [(how, form) for how in ("stack", "split") for form in FORMS[: 1 if quick else None]]:
        ours, other = turns("build", how, form, clients, theirs=(how, FORMS[0], few))
        line = f"{how + ', ' + form:28} {ours['us']:11.2f} {ours['us'] * clients / 1e6:8.2f} |"
        print(line + (f" {other['us']:9.1f} {ours['us'] / other['us']:10.4f}" if other else ""), flush=True)


def _clients(turns: Turns, quick: bool) -> None:
    sizes, count, most = ((200, 1_000), 50, 1_000) if quick else ((10**3, 10**4, 10**5, 10**6), 5_000, 10**4)
    print(f"\nclients: cohort {COHORT}, {count:,} iterations of `solve` (the other checkout up to {most:,} clients)")
    print(f"{'':28} {'cpu, ms':>8} {'wall':>7} {'growth':>7} {'peak MB':>8} {'rows + state':>12} {'times':>6} |"
          f" {'other, ms':>9} {'ours of it':>10}")  # fmt: skip
    for name in ("Lockstep", "AggITD")[: 1 if quick else None]:
        first = None
        for size in sizes:
            ours, other = turns("grow", name, size, count, theirs=(name, size, count) if size <= most else None)
            first = first or ours["cpu"]
            line = f"{name + f', {size:,}':28} {ours['cpu']:8.3f} {ours['wall']:7.3f} {ours['cpu'] / first:7.2f} "
            line += f"{ours['peak']:8.0f} {ours['held']:12.1f} {ours['peak'] / ours['held']:6.2f} |"
            print(line + (f" {other['cpu']:9.3f} {ours['cpu'] / other['cpu']:10.3f}" if other else ""), flush=True)


def _uneven(turns: Turns, quick: bool) -> None:
    rows, few = (1_000, 500) if quick else (100_000, 5_000)
    print(f"\nuneven: {rows:,} rows, nearly all of one client (the other checkout: {few:,})")
    print(f"{'':28} {'MB':>7} {'cpu, ms':>8} {'even, ms':>9} {'times':>6} | {'other: MB':>9} {'times':>6}")
    for name in ("AggITD", "Lockstep")[: 1 if quick else None]:
        of = lambda kind, rows, name=name: (kind, rows, name, None, None, 1 if quick else 3)
        ours, other = turns("uneven.measure", *of("one", rows), theirs=of("one", few))
        even, level = turns("uneven.measure", *of("even", rows), theirs=of("even", few))
        line = (
            f"{name:28} {ours['memory']:7.0f} {ours['cpu']:8.1f} {even['cpu']:9.1f} {ours['cpu'] / even['cpu']:6.2f} |"
        )
        print(
            line + (f" {other['memory']:9.0f} {other['cpu'] / level['cpu']:6.2f}" if other and level else ""),
            flush=True,
        )


def _network(turns: Turns, quick: bool) -> None:
    print(f"\nnetwork\n{'':36} {'trace s':>7} {'compile s':>9} {'iteration ms':>12} {'peak MB':>8} {'data MB':>8} "
          f"{'grown MB':>8} | {'other, s':>8} {'ms':>8} {'ours of them':>12}")  # fmt: skip
    lines = [(f"N = {rounds}", (100, 10, None, rounds, 0)) for rounds in (5, 50, 200)]
    lines += [(f"{clients:,} clients, cohort 10", (clients, 10, None, 5, 0)) for clients in (100, 1_000, 10_000)]
    lines += [
        (f"1,000 clients, cohort {cohort:,}" + (f", {batch} at a time" if batch else ""), (1_000, cohort, batch, 5, 0))
        for cohort, batch in ((100, None), (1_000, None), (1_000, 100), (1_000, 10))
    ]
    lines.append(("2,000 iterations more", (100, 10, None, 5, 2_000)))
    for label, settings in [("4 clients, cohort 2", (4, 2, None, 2, 100))] if quick else lines:
        m, other = turns("network", *settings, theirs=settings)
        line = f"{label:36} {m['trace']:7.2f} {m['compile']:9.2f} {m['iteration']:12.2f} {m['peak']:8.0f} "
        line += f"{m['data']:8.1f} {m['grown']:8.1f} |"
        if other:
            spent, theirs = m["trace"] + m["compile"], other["trace"] + other["compile"]
            ratios = f"{spent / theirs:.2f} {m['iteration'] / other['iteration']:.2f}"
            line += f" {theirs:8.2f} {other['iteration']:8.2f} {ratios:>12}"
        print(line, flush=True)


PARTS = {"building": _building, "clients": _clients, "uneven": _uneven, "network": _network}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, one process each: to see that it works")
    parser.add_argument("--against", type=Path, help="another checkout of the library, to compare with")
    parser.add_argument("--turns", type=int, default=5, help="processes for each measurement")
    parser.add_argument("--only", choices=PARTS, help="one part of it")
    given = parser.parse_args()
    other = None if given.against is None else given.against.resolve() / "src"
    turns = Turns(other, 1 if given.quick else given.turns)
    for name, part in PARTS.items():
        if given.only in (None, name):
            part(turns, given.quick)


if __name__ == "__main__":
    main()
