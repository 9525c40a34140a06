"""Several processes as one: they join, know whose clients are whose, and all hear what one of them says.

All processes run the same program on the same arguments. What depends on more than these (a clock, a file, a user's
metric or callback) is asked of process 0 alone, and the others are told: so all go the same way. What each process does
by itself (reading its own rows) and may refuse is done in all, and one refusal is everybody's.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from .errors import InputError, RunError, check
from .given import JSON, Whole, whole_number
from .jaxprs import Tracer

HEARTBEAT = 20  # seconds without a sign of life until JAX takes a process for dead; JAX's own 100 are too many
COUNT, INDEX = "FEDBILEVEL_PROCESSES", "FEDBILEVEL_PROCESS"  # how our launcher tells a process
ADDRESS = "JAX_COORDINATOR_ADDRESS"  # where process 0 is, host:port
NOTES = "FEDBILEVEL_NOTES"  # a folder in which processes leave a word for the launcher
CHECKPOINT, GONE = "checkpoint", "gone"  # the words: where the last one is; that another process has ended
RANKS = ((COUNT, INDEX), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"),
          ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"))  # fmt: skip
_SMALL = 1024  # bytes told at once: one compiled program does for nearly all there is to tell
_OTHERS = ("gloo", "connection", "unavailable", "heartbeat", "coordination", "deadline", "socket", "nccl")

Thing = TypeVar("Thing")


class ProcessGone(RunError):
    """Another process of the run has ended, so that this one cannot go on."""


class Processes:
    """The processes of a run; of this class itself a single one, which speaks to nobody.

    Attributes:
        count, index: how many they are, and which of them this is.
        lost: whether another one has ended, so that nothing can be told or asked any more.
    """

    count = 1
    index = 0
    lost = False

    @property
    def leads(self) -> bool:
        """Whether this is process 0, which writes files and shows progress."""
        return self.index == 0

    def said(self, function: Callable[[], Thing]) -> Thing:
        """What the function returns in process 0, where alone it is called: in all. Words and numbers, or None.

        Raises:
            InputError, RunError: as it raises there; whatever else it raises is a RunError in the others.
        """
        return function()

    def together(self, function: Callable[[], Thing]) -> list[Thing]:
        """What the function, called in all, returns in each, by process. Words and numbers, or None.

        Raises:
            InputError, RunError: as it raises in the first in which it does.
        """
        return [function()]

    def judged(self, error: BaseException) -> BaseException:
        """An error that ends a run, as it is to be raised: another one where a process has gone."""
        return error


ALONE = Processes()
_left: list[BaseException] = []  # what ended runs over several processes, in this one and maybe in no other


def left() -> bool:
    """Whether this process has left a run that others may still be in."""
    return bool(_left)


class Several(Processes):
    """The processes of `jax.distributed`."""

    def __init__(self) -> None:
        self.count, self.index = jax.process_count(), jax.process_index()

    def said(self, function: Callable[[], Thing]) -> Thing:
        value, error = _tried(function) if self.leads else (None, None)
        told = json.loads(_told(_words(value, error, self.index) if self.leads else b""))
        if error is not None:
            raise error
        return value if self.leads else _heard(told)  # pyright: ignore[reportReturnType]

    def together(self, function: Callable[[], Thing]) -> list[Thing]:
        value, error = _tried(function)
        every = [json.loads(words) for words in _gathered(_words(value, error, self.index))]
        for process, told in enumerate(every):
            if process == self.index and error is not None:
                raise error
            _heard(told)
        return [value if process == self.index else _heard(told) for process, told in enumerate(every)]  # pyright: ignore[reportReturnType]

    def judged(self, error: BaseException) -> BaseException:
        if isinstance(error, (InputError, RunError)):
            return error
        self.lost = True  # this one ends by itself, or another has: nobody waits for anybody any more
        _left.append(error)
        if not of_another(error):
            return error
        first = (str(error).strip().splitlines() or [""])[0][:200]
        gone = ProcessGone(
            f"another process of the run has ended, so that process {self.index} cannot go on: start all of them again, "
            f"with resume= a folder that has a checkpoint. (JAX says: {first})"
        )
        gone.__cause__ = error
        return gone


def of(mesh: jax.sharding.Mesh | None) -> Processes:
    """The processes over which a mesh lies.

    Raises:
        InputError: it lies over some of several processes.
    """
    if mesh is None or len(found := {device.process_index for device in mesh.devices.flat}) == 1:
        return ALONE
    check(
        len(found) == jax.process_count(),
        f"mesh= has devices of {len(found)} of the {jax.process_count()} processes: it takes those of all.",
    )
    return Several()


# Joining ----------------------------------------------------------------------------------------------------------------


def join(axis: str = "clients") -> jax.sharding.Mesh:
    """Join the other processes of this program, and get the mesh of all their devices, for `Simulation(mesh=)`.

    To be called before anything else is done with JAX. How many processes there are, and which is this one, is known from
    who started them: `fedbilevel launch`, mpirun or srun; a process that was started alone is alone. Calls
    `jax.distributed.initialize` unless that was done; on CPUs the processes talk by gloo.

    Args:
        axis: what to call the mesh's one axis.

    Raises:
        InputError: it is not known where process 0 is (set JAX_COORDINATOR_ADDRESS=host:port), or JAX has computed
            something already.
    """
    count, index = rank()
    if count > 1 and not jax.distributed.is_initialized():
        try:
            jax.distributed.initialize(
                num_processes=count, process_id=index, heartbeat_timeout_seconds=HEARTBEAT,
            )  # fmt: skip
        except ValueError as error:
            raise InputError(
                f"process {index} of {count} is not told where process 0 is: set {ADDRESS}=host:port in all of them."
            ) from error
        except RuntimeError as error:
            raise InputError(f"fedbilevel.processes.join() comes before all else: {error}") from error
        # they meet now: gloo waits for 30 seconds when processes talk for the first time, and reading rows may take longer
        multihost_utils.sync_global_devices("fedbilevel")
    return jax.make_mesh((len(jax.devices()),), (axis,), axis_types=(jax.sharding.AxisType.Auto,))


def mine(clients: Whole) -> range:
    """Which of so many clients are this process's to load: a block for each process, as even as can be.

    Args:
        clients: how many there are in all, at least one for each process.

    Raises:
        InputError: they are fewer than the processes.
    """
    count, index = jax.process_count(), jax.process_index()
    m = whole_number(clients, count, "mine(clients) takes how many clients there are, at least one for each process")
    return range(m * index // count, m * (index + 1) // count)


def rank() -> tuple[int, int]:
    """(How many processes there are, which is this one), as the environment says."""
    for count, index in RANKS:
        given = os.environ.get(count, ""), os.environ.get(index, "")
        if all(text.isdigit() for text in given):
            return int(given[0]), int(given[1])
    return 1, 0


# Arrays over several processes ------------------------------------------------------------------------------------------


def apart(leaf: PyTree) -> bool:
    """Whether an array lies in several processes."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and not leaf.is_fully_addressable


def whole_over(leaves: Iterable[PyTree]) -> jax.sharding.NamedSharding | None:
    """How what is computed from such arrays lies whole in every process; None where none of them lies in several."""
    if not _several():
        return None
    found = next((leaf.sharding for leaf in leaves if apart(leaf)), None)
    assert found is None or isinstance(found, jax.sharding.NamedSharding), found
    return None if found is None else jax.sharding.NamedSharding(found.mesh, jax.sharding.PartitionSpec())


@functools.cache
def _several() -> bool:
    return jax.process_count() > 1


def everywhere(tree: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """A pytree of arrays that all processes have, as ones that lie whole on every device of the mesh."""
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def put(leaf: np.ndarray | jax.Array) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == place:
            return leaf
        own = np.asarray(leaf)
        return jax.make_array_from_callback(own.shape, place, lambda index: own[index])

    return jax.tree.map(put, tree)


def here(tree: PyTree) -> PyTree:
    """Arrays that lie whole on every device, as this process's own."""
    return jax.tree.map(lambda leaf: jax.numpy.asarray(np.asarray(leaf)) if apart(leaf) else leaf, tree)


# What is told -----------------------------------------------------------------------------------------------------------


def _tried(function: Callable[[], Thing]) -> tuple[Thing | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:  # whatever it is: the others are told
        return None, error


def _words(value: object, error: Exception | None, process: int) -> bytes:
    said: dict[str, object] = {"value": value}
    if error is not None:
        own = isinstance(error, (InputError, RunError))
        text = str(error) if own else f"process {process} failed: {type(error).__name__}: {error}"
        said = {"kind": "input" if isinstance(error, InputError) else "run", "text": text}
    return json.dumps(said).encode()


def _heard(told: dict[str, JSON]) -> JSON:
    if "text" in told:
        raise (InputError if told["kind"] == "input" else RunError)(str(told["text"]))
    return told["value"]


def _told(words: bytes) -> bytes:
    """Process 0's words."""
    head = np.zeros(_SMALL, np.uint8)
    begin = len(words).to_bytes(8, "little") + words[: _SMALL - 8]
    head[: len(begin)] = np.frombuffer(begin, np.uint8)
    head = multihost_utils.broadcast_one_to_all(head)
    length = int.from_bytes(head[:8].tobytes(), "little")
    if length <= _SMALL - 8:
        return head[8 : 8 + length].tobytes()
    return multihost_utils.broadcast_one_to_all(_padded(words, length))[:length].tobytes()


def _gathered(words: bytes) -> list[bytes]:
    """Every process's words."""
    lengths = multihost_utils.process_allgather(np.asarray([len(words)], np.int32)).reshape(-1)
    every = multihost_utils.process_allgather(_padded(words, int(lengths.max())))
    return [row[:length].tobytes() for row, length in zip(every, lengths, strict=True)]


def _padded(words: bytes, length: int) -> np.ndarray:
    """So many bytes and more, of few different lengths: each is a program of its own."""
    size = _SMALL
    while size < length:
        size *= 4
    out = np.zeros(size, np.uint8)
    out[: len(words)] = np.frombuffer(words, np.uint8)
    return out


def of_another(error: BaseException) -> bool:
    """Whether an error tells of another process that has ended, not of this one's own work."""
    told = isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error).lower() for word in _OTHERS)
    return told or isinstance(error, ProcessGone)


def note(name: str, words: str) -> None:
    """Leave a word for the launcher, if there is one."""
    if NOTES in os.environ:
        place = Path(os.environ[NOTES]) / name
        with contextlib.suppress(OSError):  # it has gone
            beside = place.with_name(f"{name}.{os.getpid()}")
            beside.write_text(words)
            os.replace(beside, place)
