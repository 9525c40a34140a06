"""One more of each kind, as somebody would add it: a file, and a line in the registry of its folder.

The algorithm is FedMSA under another name with its docstring, the task a ridge task under another name; the data set is a
table, the engine one that waits, the callback one that counts.
"""

from __future__ import annotations

from pathlib import Path

TABLE = '''"""Rents of flats by their size and their rooms, as a table."""

from __future__ import annotations

import io

import pandas

from .base import Dataset, Facts, Source, split

FACTS = Facts("numbers", clients=3)
ROWS = """size,rooms,rent
{rows}
"""


def flats(seed: int = 0) -> Dataset:
    """The table; a quarter of its rows is for the test, drawn by `seed`."""
    table = pandas.read_csv(io.StringIO(ROWS))
    return split("flats", table[["size", "rooms"]].to_numpy(), table["rent"].to_numpy(), seed, None, FACTS)


FLATS = Source("flats", "30 / 10 rows of 2 features, a number", FACTS, lambda data_dir: flats())
'''

ENGINE = '''"""An engine that takes its time, as slow clients would."""

from __future__ import annotations

import dataclasses
import time
from typing import ClassVar

from jaxtyping import Array, Key, PyTree

from ..algorithm import Algorithm
from ..data import FederatedData
from ..problem import Problem
from ..protocol import step as iteration
from .base import Carry, Engine, Execution, Program, Record
from .simulation import Simulation


@dataclasses.dataclass(frozen=True)
class Delayed(Engine):
    """Run an algorithm as `Simulation` does, and wait before every stretch.

    Args:
        cohort: how many clients each exchange asks; None for all.
        seconds: how long to wait.
    """

    name: ClassVar[str] = "delayed"
    use: ClassVar[str] = "progress bars that want to be looked at"

    cohort: int | None = None
    seconds: float = 0.01

    def bind(
        self, problem: Problem, data: FederatedData, algorithm: Algorithm, state: PyTree, key: Key[Array, ""],
        program: Program = iteration,
    ) -> Execution:
        return _Waiting(Simulation(self.cohort).bind(problem, data, algorithm, state, key, program), self.seconds)


class _Waiting(Execution):
    def __init__(self, inner: Execution, seconds: float):
        super().__init__(inner.engine, inner.problem, inner.data, inner.key, inner.protocol, inner.program)
        self.inner, self.seconds = inner, seconds

    def start(self, algorithm: Algorithm, state: PyTree) -> Carry:
        return self.inner.start(algorithm, state)

    def advance(self, algorithm: Algorithm, carry: Carry, iterations: int, limit: float) -> tuple[Carry, Record]:
        time.sleep(self.seconds)
        carry, record = self.inner.advance(algorithm, carry, iterations, limit)
        return carry, dataclasses.replace(record, seconds=record.seconds + self.seconds)
'''

CALLBACK = '''"""How many rows a run's history has got."""

from __future__ import annotations

from .base import Callback, Row, Running


class Counting(Callback):
    """Counts the rows of the history as they appear."""

    def __init__(self) -> None:
        self.rows = 0

    def record(self, run: Running, rows: list[Row]) -> None:
        self.rows += len(rows)
'''

LINES = {  # folder -> the line in its registry
    "algorithms": "from .second_msa import SecondMSA as SecondMSA\n",
    "tasks": "from .second_ridge import second_ridge as second_ridge\n",
    "datasets": "from .flats import FLATS as FLATS\n",
    "engines": "from .delayed import Delayed as Delayed\n",
    "callbacks": "from .counting import Counting as Counting\n",
}


def add(package: Path) -> None:
    """Add one of each to the tree of `fedbilevel` in the folder `package`."""
    rows = "\n".join(f"{20 + size},{1 + size // 25},{300 + 11 * size + 40 * (size % 3)}" for size in range(0, 120, 3))
    algorithm = (package / "algorithms" / "fedmsa.py").read_text()
    task = (package / "tasks" / "ridge.py").read_text()
    files = {
        "algorithms/second_msa.py": algorithm.replace("FedMSA", "SecondMSA").replace('"fedmsa"', '"second-msa"'),
        "tasks/second_ridge.py": task.replace('"ridge"', '"second-ridge"').replace("\nridge = ", "\nsecond_ridge = "),
        "datasets/flats.py": TABLE.format(rows=rows),
        "engines/delayed.py": ENGINE,
        "callbacks/counting.py": CALLBACK,
    }
    for place, text in files.items():
        (package / place).write_text(text)
    for folder, line in LINES.items():
        with (package / folder / "shipped.py").open("a") as registry:
            registry.write(line)
