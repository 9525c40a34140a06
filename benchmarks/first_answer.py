"""How long the first answer takes: python benchmarks/first_answer.py [--quick] [--turns N] [--against PATH]

Each figure is of a process of its own. "build" is the digits hyper-representation task (20 clients, shards); "first" the
first `solve` of one iteration, with a cohort of 5 and nothing compiled before; "second process" the same where an earlier
process has kept what it compiled; "50 iterations" the iterations after the first, in the same process. Cpu seconds of the
process, beyond importing and building; of `make demo`'s command wall seconds, the second time.

With --against, another checkout (a folder with `src`) is measured in turn with this one, and a ratio beside each line.
There a program is compiled in the one way it knows; its cache of compiled programs is JAX's own: as it comes, which keeps
what took a second to compile, and ("all kept") with every entry.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
DEMO = (
    "compare hyper-representation --dataset digits --partition shards --clients 20 --algorithms aggitd,fednest "
    "--seeds 3 --rounds 200 --overwrite --out demo"
)
ALGORITHMS = ("AggITD", "Lockstep", "SimFBO")
CHILD = """
import inspect, json, sys, time
import jax
import fedbilevel as fb
from fedbilevel.tasks.hyper_representation import hyper_representation
fb.AggITD, fb.Simulation, fb.solve
name, way = sys.argv[1:]
begin = time.process_time()
task = hyper_representation(dataset="digits", partition="shards", clients=20, seed=0)
built = time.process_time() - begin
steps = dict(inner_lr=0.1, hessian_lr=0.01, outer_lr=0.01)
algorithm = fb.AggITD(inner_rounds=5, **steps) if name == "AggITD" else getattr(fb.algorithms, name)(**steps)
knows = "compile" in inspect.signature(fb.Simulation).parameters
engine = fb.Simulation(cohort=5, **({"compile": way} if knows else {}))
solve = lambda n: fb.solve(task.problem, task.data, algorithm, task.x, task.y, n, key=task.key, engine=engine)
begin = time.process_time()
solve(1)
first = time.process_time() - begin
begin = time.process_time()
solve(51)
print(json.dumps({"build": built, "first": first, "more": time.process_time() - begin}))
"""


def child(tree: Path, cache: Path | None, name: str, way: str, everything: bool = True) -> dict[str, float]:
    """What a process of a checkout measures of itself."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, name, way],
        env=environment(tree, cache, everything), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def environment(tree: Path, cache: Path | None, everything: bool = True) -> dict[str, str]:
    """A process's: a checkout's modules; where compiled programs are kept (None: nowhere), by JAX all or as it comes."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "FEDBILEVEL_"))}
    own["PYTHONPATH"] = os.pathsep.join(map(str, (tree / "src", tree / "studies" / "src")))
    if cache is None:
        return own | {"FEDBILEVEL_CACHE": "off", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    if (tree / "src" / "fedbilevel" / "cache.py").is_file():
        return own | {"FEDBILEVEL_CACHE": str(cache)}
    threshold = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} if everything else {}
    return own | {"JAX_COMPILATION_CACHE_DIR": str(cache)} | threshold


def demo(tree: Path, cache: Path, quick: bool) -> float:
    """Wall seconds of `make demo`'s command."""
    words = (DEMO.replace("--rounds 200", "--rounds 20") if quick else DEMO).split()
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "fedbilevel", *words],
        env=environment(tree, cache), cwd=cache, capture_output=True, check=True,
    )  # fmt: skip
    return time.perf_counter() - begin


def measured(trees: list[Path], turns: int, quick: bool) -> dict[str, list[list[float]]]:
    """By line, for each checkout the figures of all turns."""
    found: dict[str, list[list[float]]] = {}

    def note(line: str, place: int, value: float) -> None:
        found.setdefault(line, [[] for _ in trees])[place].append(value)

    names = ALGORITHMS[1:2] if quick else ALGORITHMS
    for turn in range(turns):
        for name in names:
            for way in ("quick", "full"):
                for place, tree in enumerate(trees):
                    figures = child(tree, None, name, way)
                    note("build the task", place, figures["build"])
                    note(f"{name}, first, {way}", place, figures["first"])
                    note(f"{name}, 50 iterations, {way}", place, figures["more"])
                    for everything, line in ((False, "second process"), (True, "second, all kept")):
                        with tempfile.TemporaryDirectory() as folder:
                            child(tree, Path(folder), name, way, everything)
                            again = child(tree, Path(folder), name, way, everything)
                            note(f"{name}, {line}, {way}", place, again["first"])
        for place, tree in enumerate(trees):
            if turn < 3:
                with tempfile.TemporaryDirectory() as folder:
                    demo(tree, Path(folder), quick)
                    note("make demo, second time (wall)", place, demo(tree, Path(folder), quick))
        print(f"turn {turn + 1} of {turns}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="once, Lockstep alone: to see that it works")
    parser.add_argument("--turns", type=int, default=5, help="how often each is measured")
    parser.add_argument("--against", type=Path, help="another checkout to measure in turn")
    given = parser.parse_args()
    against = None if given.against is None else given.against.resolve()
    if against is not None and not (against / "src" / "fedbilevel").is_dir():
        parser.error(f"--against is a checkout of fedbilevel; {given.against} has no src/fedbilevel.")
    trees = [HERE, *([] if against is None else [against])]
    turns = 1 if given.quick else given.turns
    found = measured(trees, turns, given.quick)
    print(f"medians of {turns} in turns; Python {sys.version.split()[0]}")
    print(
        f"{'':34} {'seconds':>8} {'least':>7} {'most':>7}" + ("" if against is None else f" {'theirs':>8} {'ratio':>6}")
    )
    for line, figures in found.items():
        own = figures[0]
        median = statistics.median(own)
        text = f"{line:34} {median:8.2f} {min(own):7.2f} {max(own):7.2f}"
        if against is not None:
            theirs = statistics.median(figures[1])
            text += f" {theirs:8.2f} {median / theirs:6.2f}"
        print(text)


if __name__ == "__main__":
    main()
