"""Rows loaded client by client: where several processes share the work, each by the process that holds it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import numpy as np
from jaxtyping import PyTree

from .arrays import on_device
from .blocks import Sizes
from .data import FederatedData, Labels, Level, LevelName, Weights, client_weights
from .errors import InputError, RunError, check
from .given import JSON, Whole, whole_number
from .problem import describe
from .processes import Processes, mine
from .processes import of as over
from .rows.clients import NamesLike, called
from .rows.spread import Part, dealt, laid, part
from .rows.values import columns_apart

Load: TypeAlias = Callable[[int], tuple[PyTree, PyTree]]  # (a client's number) -> its inner and its outer rows

_LEVELS: tuple[LevelName, LevelName] = ("inner", "outer")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def load_clients(
    load: Load,
    clients: Whole,
    *,
    mesh: jax.sharding.Mesh | None = None,
    weights: Weights = None,
    names: NamesLike = None,
) -> FederatedData:
    """The data of clients whose rows a function loads: of several processes, each asks it for its own clients alone.

    All processes call it with the same arguments, and get data whose rows lie where they were loaded; what describes them
    (counts, weights, names) all have. It is the same data for any number of processes.

    Args:
        load: `load(i)` -> (inner rows, outer rows) of client i, as `FederatedData.stack` takes them.
        clients: how many there are: i is below it. At least one for each process.
        mesh: of the devices of all processes, as `fedbilevel.processes.join()` gives it; run it on `Simulation(mesh=mesh)`.
            None, or a mesh in one process: that process loads all.
        weights, names: as for `FederatedData.stack`, of all clients.

    Raises:
        InputError: what `FederatedData.stack` refuses, of any client, in all processes; or `load` returns no pair.
        RunError: `load` failed, in whatever process.
    """
    processes = over(mesh)
    count = whole_number(clients, processes.count, "clients= is how many clients there are, at least one a process")
    every = called((), names, count)
    if mesh is None or processes.count == 1:
        return FederatedData.stack(
            *_loaded(load, range(count)), weights=weights, names=None if names is None else every
        )
    return _of_all(load, mine(count), mesh, processes, weights, every, names is not None)


def _loaded(load: Load, which: Sequence[int]) -> tuple[list[PyTree], list[PyTree]]:
    inner, outer = [], []
    for client in which:
        try:
            found = load(client)
        except (InputError, RunError):
            raise
        except Exception as error:  # whatever the user's function raises
            raise RunError(f"load({client}) failed: {type(error).__name__}: {error}") from error
        pair = isinstance(found, tuple) and len(found) == 2
        check(pair, lambda client=client: f"load({client}) returns (inner rows, outer rows), a tuple of two.")
        inner.append(found[0])
        outer.append(found[1])
    return inner, outer


def _of_all(
    load: Load, own: range, mesh: jax.sharding.Mesh, processes: Processes, weights: Weights,
    names: Sequence[str], named: bool,
) -> FederatedData:  # fmt: skip
    read: list[FederatedData] = []

    def tell() -> dict:
        read.append(FederatedData.stack(*_loaded(load, own), names=[names[client] for client in own]))
        return _told(read[0], names[own[0]])

    told: list[dict] = processes.together(tell)
    for other in told[1:]:
        _check_alike(other, told[0])
    counted = lambda level: np.concatenate([np.asarray(each[level]["counts"]) for each in told])
    inner, outer = counted("inner"), counted("outer")
    sizes = [len(each["inner"]["counts"]) for each in told]
    device = _devices(inner + outer, sizes, mesh)
    p_inner, p_outer = client_weights(weights, inner, outer, names)
    begin = [int(counts[: own[0]].sum()) for counts in (inner, outer)]
    scales = np.ones(len(inner)), np.ones(len(inner)) if weights is None else p_outer / p_inner
    made = [
        _level(getattr(read[0], name), counts, first, scale, device, mesh)
        for name, counts, first, scale in zip(_LEVELS, (inner, outer), begin, scales, strict=True)
    ]
    real = jax.dtypes.canonicalize_dtype(float)
    labels = Labels(tuple(names) if named else (), {level: read[0].columns(level) for level in _LEVELS})
    return FederatedData(made[0], made[1], None if weights is None else on_device(p_inner.astype(real)), labels)


def _level(
    own: Level, counts: np.ndarray, begin: int, scale: np.ndarray, device: np.ndarray, mesh: jax.sharding.Mesh
) -> Level:
    """A level of all clients, from this process's own, whose first row is the one that `begin` says."""
    where: Part = part(counts, device, mesh.devices.size)

    def spread(leaf: jax.Array) -> jax.Array:
        held = np.asarray(leaf)
        return laid(lambda first, last: held[first - begin : last - begin], held, where, mesh)

    rows = jax.tree.map(spread, own.rows)
    real = jax.dtypes.canonicalize_dtype(float)
    return Level(rows, on_device(where.offsets), on_device(counts.astype(np.int32)), on_device(scale.astype(real)),
                 int(counts.max()), Sizes.of(counts))  # fmt: skip


def _devices(rows: np.ndarray, sizes: Sequence[int], mesh: jax.sharding.Mesh) -> np.ndarray:
    """(clients,) the device of each, one of the process that loads it."""
    owner = np.array([device.process_index for device in mesh.devices.flat])
    check(np.all(np.diff(owner) >= 0), "mesh= has each process's devices side by side, as processes.join() makes it.")
    ends = np.cumsum(sizes)
    return np.concatenate(
        [
            np.flatnonzero(owner == process)[dealt(rows[end - size : end], int((owner == process).sum()))]
            for process, (size, end) in enumerate(zip(sizes, ends, strict=True))
        ]
    ).astype(np.int32)


# What processes tell each other of their rows -----------------------------------------------------------------------------


def _told(own: FederatedData, name: str) -> dict:
    return {"name": name} | {level: _described(own, level) for level in _LEVELS}


def _described(own: FederatedData, name: LevelName) -> dict[str, JSON]:
    level: Level = getattr(own, name)
    leaves, structure = jax.tree.flatten(level.rows)
    return {
        "counts": own.count(name).tolist(),
        "structure": _ADDRESS.sub("", str(structure)),
        "leaves": [[str(leaf.dtype), *leaf.shape[1:]] for leaf in leaves],
        "columns": {path: list(columns) for path, columns in own.columns(name).items()},
        "rows": describe(level.alone(0).rows),
    }


def _check_alike(one: dict, other: dict) -> None:
    """Refuse rows of a process whose structure, columns, shapes or dtypes are not those of the first.

    Raises:
        InputError: with the first client of either.
    """
    name, first = one["name"], other["name"]
    for level in _LEVELS:
        mine, theirs = one[level], other[level]
        for path in {**theirs["columns"], **mine["columns"]}:
            columns = [tuple(each["columns"].get(path, ())) or None for each in (mine, theirs)]
            apart = columns_apart(columns[0], columns[1], name, first)
            check(
                not apart,
                f"{apart}, in its {level} rows{f', at {path}' if path else ''}: a row is the vector of its columns, so give "
                "all clients the same ones in the same order.",
            )
        same = (mine["structure"], mine["leaves"]) == (theirs["structure"], theirs["leaves"])
        check(
            same,
            f"{name} has other {level} data than {first}: {mine['rows']} against {theirs['rows']} (only the number of rows "
            "may differ).",
        )
