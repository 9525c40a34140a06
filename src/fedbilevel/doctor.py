"""What a bug report needs: versions, devices, the cache of compiled programs, extras; and a short test against closed forms.

Nothing here tells who you are: the home folder is written `~`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from . import cache, reference
from .algorithms.lockstep import Lockstep
from .engines.loopback import Loopback
from .engines.simulation import Simulation
from .jaxprs import jaxlib_version
from .machine import cores
from .problem import Problem
from .solve import solve
from .tasks import Task
from .tasks.quadratic import quadratic
from .testing import distance
from .version import __version__

NEEDED = ("numpy", "equinox", "optax", "lineax", "jaxtyping", "scikit-learn", "pandas", "matplotlib", "rich", "typer")
EXTRAS = {  # by what is imported: the extra that brings it
    "torch": "torch", "nvflare": "nvflare", "pyarrow": "tables", "tensorboardX": "tensorboard", "wandb": "wandb",
}  # fmt: skip
BESIDE = ("flax", "polars", "datasets", "flwr-datasets")  # taken where they are, in no extra
CLIENTS, ITERATIONS, CLOSE = 5, 300, 1e-3


class Told(NamedTuple):
    """One line: of a section, what it is and what it says."""

    section: str
    name: str
    value: str


class Tested(NamedTuple):
    """One test: whether it passed, what was seen, and how long it took."""

    name: str
    passed: bool
    seen: str
    seconds: float


def facts() -> list[Told]:
    """Versions, machine, devices, cache and extras; it starts JAX."""
    return [*_versions(), *_machine(), *_cache(), *_extras()]


def _versions() -> Iterator[Told]:
    yield Told("versions", "fedbilevel", __version__)
    yield Told("versions", "python", platform.python_version())
    yield Told("versions", "jax", jax.__version__)
    yield Told("versions", "jaxlib", jaxlib_version)
    for name in NEEDED:
        yield Told("versions", name, _version(name) or "missing: install fedbilevel again")


def _machine() -> Iterator[Told]:
    yield Told("machine", "system", f"{platform.system()} {platform.machine()}, {cores()} cores")
    devices = jax.devices()
    kinds = sorted({f"{device.platform} ({device.device_kind})" for device in devices})
    yield Told("machine", "devices", f"{len(devices)} x {', '.join(kinds)}")
    wide = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    yield Told("machine", "precision", f"{64 if wide else 32} bits")
    for name in ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_ENABLE_X64", "JAX_COMPILATION_CACHE_DIR", cache.ENVIRONMENT):
        if os.environ.get(name):
            yield Told("machine", name, _short(os.environ[name]))


def _cache() -> Iterator[Told]:
    cache.begin()
    place = cache.folder()
    if place is None:
        yield Told("cache", "compiled programs", "not kept by fedbilevel: a first run compiles anew each time")
        return
    files = [file for file in place.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 2**20
    yield Told("cache", "compiled programs", f"{len(files):,} files, {size:,.1f} MiB, in {_short(str(place))}")


def _extras() -> Iterator[Told]:
    for name, extra in EXTRAS.items():
        yield Told("extras", name, _version(name) or f"not installed: pip install 'fedbilevel[{extra}]'")
    for name in BESIDE:
        if version := _version(name):
            yield Told("extras", name, version)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _short(text: str) -> str:
    home = str(Path.home())
    return text if home == "/" else text.replace(home, "~")


# The test -------------------------------------------------------------------------------------------------------------


def tests() -> Iterator[Tested]:
    """Each test as it is done, about ten seconds in all; what fails is told, not raised."""
    task = quadratic(clients=CLIENTS, seed=0)
    yield _done("the hypergradient is that of the closed form", lambda: _hypergradient(task))
    yield _done("a run with no step given ends at the optimum", lambda: _optimum(task))
    yield _done("the engines give the same numbers", lambda: _engines(task))
    if _version("torch") is not None:
        yield _done("a problem in PyTorch has the same hypergradient", lambda: _in_torch(task))


def _done(name: str, test: Callable[[], tuple[float, float]]) -> Tested:
    begin = time.perf_counter()
    try:
        off, most = test()
        passed, seen = bool(off <= most), f"off by {off:.1e}, {most:.0e} allowed"
    except Exception as error:  # whatever is wrong with this installation
        passed, seen = (
            False,
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
        )
    return Tested(name, passed, seen, time.perf_counter() - begin)


class _Exact(NamedTuple):
    """Clients' means, float64: g = y'Hy/2 - y'(Bx + b), f = |y - t|^2 / 2 + |x|^2 / 20."""

    hessian: np.ndarray
    cross: np.ndarray
    centre: np.ndarray
    target: np.ndarray

    def hypergradient(self, x: np.ndarray) -> np.ndarray:
        y = np.linalg.solve(self.hessian, self.cross @ x + self.centre)
        return 0.1 * x + self.cross.T @ np.linalg.solve(self.hessian, y - self.target)

    def optimum(self) -> np.ndarray:
        zero = self.hypergradient(np.zeros(self.cross.shape[1]))
        columns = [self.hypergradient(unit) - zero for unit in np.eye(self.cross.shape[1])]
        return np.linalg.solve(np.stack(columns, 1), -zero)


def _exact(task: Task) -> _Exact:
    mean = lambda level, name: np.mean(
        [np.asarray(level.alone(i).rows[name], np.float64).mean(0) for i in range(task.data.clients)], axis=0
    )
    hessian, cross, centre = (mean(task.data.inner, name) for name in "HBb")
    return _Exact(hessian, cross, centre, mean(task.data.outer, "t"))


def _hypergradient(task: Task) -> tuple[float, float]:
    return _off(task, task.problem, task.x, task.y), CLOSE


def _off(task: Task, problem: Problem, x: PyTree, y: PyTree) -> float:
    """How far a hypergradient at the task's start is from the closed form, of whatever arrays the problem takes."""
    found = np.asarray(reference.hypergradient(problem, task.data, x, y), float)
    expected = _exact(task).hypergradient(np.asarray(task.x, float))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _optimum(task: Task) -> tuple[float, float]:
    result = solve(
        task.problem, task.data, Lockstep(), task.x, task.y, ITERATIONS, key=task.key, evaluate_every=ITERATIONS
    )
    best, start = _exact(task).optimum(), np.asarray(task.x, float)
    return float(np.abs(np.asarray(result.x, float) - best).max() / np.abs(start - best).max()), 0.05


def _engines(task: Task) -> tuple[float, float]:
    algorithm = Lockstep(inner_lr=0.05, hessian_lr=0.05, outer_lr=0.05, local_steps=2)
    ends = [
        solve(task.problem, task.data, algorithm, task.x, task.y, 2, key=task.key, engine=engine, check=False)
        for engine in (Simulation(cohort=3), Loopback(cohort=3))
    ]
    return distance((ends[0].x, ends[0].y), (ends[1].x, ends[1].y)), 1e-5


def _in_torch(task: Task) -> tuple[float, float]:
    from .torch.quadratic import made

    problem, (x, y) = made(np.asarray(task.x), np.asarray(task.y))
    return _off(task, problem, x, y), CLOSE
