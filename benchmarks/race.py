"""What a race costs beside one run of as many rounds: python benchmarks/race.py [--quick]

Eight candidates of Lockstep race by halves in the rounds of one run (`fb.tune`), against one Lockstep whose steps are found
too: cpu time of the process (iterations and all that is done beside them), payload, and how many programs were compiled.
Each is run once to compile and then in turns; medians. While all eight race: their iterations alone, without judging.
The issue asks for 3 times the cpu time of the run, and 8.5 while all eight race.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax

import fedbilevel as fb
from fedbilevel.beginning import as_leaves
from fedbilevel.pace.automatic import STEPS, ready
from fedbilevel.race.family import Family
from fedbilevel.race.racing import Race

AUTO = dict.fromkeys(STEPS, "auto")
MANY = 8
COLUMNS = "task", "rounds", "run, s", "race, s", "ratio", "all eight", "payload", "programs"


class Programs:
    """How many programs were compiled since `begin`."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, seconds: float, **_: object) -> None:
        self.count += event.endswith("backend_compile_duration")

    def of(self, call) -> tuple[object, float, int]:
        """(What a call gives, its cpu seconds, programs compiled in it)."""
        before, begin = self.count, time.process_time()
        found = call()
        return found, time.process_time() - begin, self.count - before


def compare(task: fb.tasks.Task, rounds: int, turns: int, programs: Programs) -> tuple:
    given, own = (task.problem, task.data), fb.Lockstep(**AUTO)
    engine = fb.Simulation(compile="full")
    common = {"key": task.key, "engine": engine, "check": False, "evaluate_every": rounds}
    run = lambda: fb.solve(*given, own, task.x, task.y, rounds=rounds, **common)
    race = lambda: fb.tune(*given, task.x, task.y, rounds=rounds, algorithms=[own] * MANY, **common)
    family = Family.of("lockstep", [as_leaves(ready(own, task.x))] * MANY)
    eight = lambda: fb.solve(*given, Race((family,)), task.x, task.y, rounds=rounds, **common)
    calls = {"run": run, "race": race, "eight": eight}
    compiled = {name: programs.of(call)[2] for name, call in calls.items()}
    timed = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            timed[name].append(programs.of(call))
    seconds = {name: statistics.median(each[1] for each in found) for name, found in timed.items()}
    payload = {name: found[-1][0].history[-1] for name, found in timed.items()}
    bytes_ = {name: row["bytes_down"] + row["bytes_up"] for name, row in payload.items()}
    again = max(each[2] for each in timed["race"])
    return (
        task.name, rounds, f"{seconds['run']:.2f}", f"{seconds['race']:.2f}", f"{seconds['race'] / seconds['run']:.2f}",
        f"{seconds['eight'] / seconds['run']:.2f}", f"{bytes_['race'] / bytes_['run']:.2f}",
        f"{compiled['run']}, {compiled['race']}; again {again}",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small task, once")
    quick = parser.parse_args(argv).quick
    programs, tasks = Programs(), fb.tasks
    several = (
        [tasks.quadratic(seed=0)] if quick else [tasks.bank(seed=0), tasks.ridge(seed=0), tasks.regularisation(seed=0)]
    )
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for task in several:
        print(
            "| " + " | ".join(map(str, compare(task, 100 if quick else 300, 1 if quick else 3, programs))) + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
