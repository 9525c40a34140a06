"""Clients' states in a file: the rows of a cohort are read before its exchange and written after it.

The file is changed in place, and a run may go back to where it stood (`Version`): each version but
the one that the file holds keeps the rows in which it differs from the next, until nobody holds it
any more. A client that was never asked has no row yet, but the state that all start with.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from io import RawIOBase
from pathlib import Path
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from ... import arrays
from ...errors import RunError
from ...jaxprs import on_host
from .layout import Layout, layout_of

_SMALL = 2**22  # bytes of rows to go back to that stay in memory

Result = TypeVar("Result")
Index = Int[np.ndarray, " cohort"]
Bytes = np.ndarray  # (rows,), each as many void bytes as a client's state takes


class Store:
    """The file of one run, in a folder; it goes with its last version, however the process ends.

    Args:
        start: the state that every client begins with.
    """

    def __init__(self, folder: Path, start: PyTree, clients: int):
        self.folder, self.layout, self.clients = folder, layout_of(start), clients
        self.start = self.layout.packed([np.asarray(leaf)[None] for leaf in jax.tree.leaves(start)])
        self.touched = np.zeros(clients, bool)
        self.error: BaseException | None = None  # what the last access failed with
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  it stays open
        weakref.finalize(self, file.close)
        self._file = _File(file, self.layout.kind)
        self._logged = np.zeros(clients, np.int32)  # the last stretch in which its row was first changed
        self._stretch = 0
        self._log: Log | None = None
        self.id = next(_numbers)
        _open[self.id] = self

    def read(self, index: Index) -> Bytes:
        """The rows of some clients, in any order."""
        rows = np.broadcast_to(self.start, index.shape).copy()
        there = np.flatnonzero(self.touched[index])
        rows[there] = self._file.read(index[there])
        return rows

    def write(self, index: Index, rows: Bytes) -> None:
        """New rows of clients, of which none is there twice; what they had is noted for going back."""
        if self._log is not None:
            fresh = index[self._logged[index] != self._stretch]
            self._log.add(fresh, self.touched[fresh], self._file.read(fresh))
            self._logged[fresh] = self._stretch
        self._file.write(index, rows)
        self.touched[index] = True

    def noting(self, log: Log | None) -> None:
        """Note from now on what rows had before they are changed; None: no longer."""
        self._stretch += 1
        self._log = log

    def put_back(self, log: Log) -> Log:
        """What a log has, as it was; returns what there was instead."""
        instead = Log(self.folder, self.layout.kind)
        for index, touched, rows in log.blocks():
            instead.add(index, self.touched[index], self._file.read(index))
            self._file.write(index[touched], rows)
            self.touched[index] = touched
        return instead


class Log:
    """Rows that differ from those of another version: each client's once."""

    def __init__(self, folder: Path, kind: np.dtype):
        self._spooled = tempfile.SpooledTemporaryFile(_SMALL, dir=str(folder))  # noqa: SIM115  as long as the log
        weakref.finalize(self, self._spooled.close)
        self._kind = kind
        self._known: list[tuple[Index, Bool[np.ndarray, " cohort"]]] = []

    def add(self, index: Index, touched: Bool[np.ndarray, " cohort"], rows: Bytes) -> None:
        """The rows of some clients; those that were not touched say nothing."""
        if index.size:
            self._known.append((index, touched))
            self._spooled.write(rows[touched].tobytes())

    def blocks(self) -> Iterator[tuple[Index, Bool[np.ndarray, " cohort"], Bytes]]:
        """What was added, piece by piece: all clients, which were touched, and the rows of these."""
        self._spooled.seek(0)
        for index, touched in self._known:
            read = self._spooled.read(int(touched.sum()) * self._kind.itemsize)
            yield index, touched, np.frombuffer(read, self._kind)


class Version(arrays.Elsewhere):
    """The clients' states at some time of a run, wherever the file stands now.

    A version that the file does not hold leads to the next on the way to the one that it does, with the rows in which
    the two differ (Baker's arrays): to go there is to swap these along the way.
    """

    def __init__(self, store: Store):
        self.store = store
        self._next: Version | None = None
        self._log: Log | None = None

    def reached(self) -> Store:
        """The store, with this version in its file."""
        way: list[Version] = [self]
        while (following := way[-1]._next) is not None:
            way.append(following)
        for version, held in zip(way[-2::-1], way[:0:-1], strict=True):
            assert version._log is not None
            held._log = self.store.put_back(version._log)
            held._next, version._next, version._log = version, None, None
        return self.store

    def changed(self, change: Callable[[Filed], Result]) -> tuple[Version, Result]:
        """(The version after what `change` writes, what it returns); this one stays as it is."""
        store = self.reached()
        given = Filed(jnp.asarray(store.id, jnp.int32), store.layout)
        self._next, self._log = after, log = Version(store), Log(store.folder, store.layout.kind)
        store.noting(log)
        store.error = None
        try:
            return after, change(given)
        except Exception as error:
            if isinstance(store.error, OSError):
                raise RunError(
                    f"the clients' states cannot be kept in {store.folder} ({store.error.strerror or store.error}): make "
                    "room there, or name another folder (client_state=)."
                ) from store.error
            raise store.error or error from None
        finally:
            store.noting(None)

    def blocks(self, index: Index | None = None) -> Iterator[list[np.ndarray]]:
        """Leaves (rows, ...) of some clients, or of all, some at a time."""
        index = np.arange(self.store.clients) if index is None else index
        many = self.store.layout.at_once
        for first in range(0, len(index), many):
            yield self.store.layout.unpacked(self.reached().read(index[first : first + many]))

    @property
    def count(self) -> int:
        return 1 + len(self.store.layout.leaves)

    def write(self, file: arrays.Writes) -> None:
        index = np.flatnonzero(self.reached().touched)
        arrays.write(file, index)
        for place, leaf in enumerate(self.store.layout.leaves):
            arrays.write_header(file, (len(index), *leaf.shape), leaf.dtype)
            for block in self.blocks(index):
                file.write(block[place].tobytes())

    def restored(self, found: Sequence[np.ndarray]) -> Version:
        if isinstance(found, arrays.Touched):
            index, *leaves = found
        else:
            index, leaves = np.arange(self.store.clients), list(found)
        self.store.layout.check(index, leaves, self.store.clients)
        many = self.store.layout.at_once

        def fill(_: Filed) -> None:
            for first in range(0, len(index), many):
                part = slice(first, first + many)
                self.store.write(np.asarray(index[part]), self.store.layout.packed([leaf[part] for leaf in leaves]))

        return self.changed(fill)[0]

    def whole(self) -> PyTree:
        """All states in memory, leaves (clients, ...)."""
        return self.each(lambda state: state)

    def each(self, function: Callable[[PyTree], PyTree]) -> PyTree:
        """A function of each client's state, leaves (clients, ...), in memory."""
        of = jax.vmap(lambda leaves: function(self.store.layout.structure.unflatten(leaves)))
        pieces = [jax.tree.map(np.asarray, of(block)) for block in self.blocks()]
        return jax.tree.map(lambda *parts: arrays.on_device(np.concatenate(parts)), *pieces)


class Filed(eqx.Module):
    """A store inside a compiled program: what is handed on from one access to the next, so that none is overtaken.

    Attributes:
        id: () int32, the store's.
        layout: of one client's state.
    """

    id: Int[Array, ""]
    layout: Layout = eqx.field(static=True)

    def read(self, index: Int[Array, " cohort"]) -> tuple[Filed, PyTree]:
        """(What follows, the states of some clients)."""
        shapes = [jax.ShapeDtypeStruct((index.shape[0], *one.shape), one.dtype) for one in self.layout.leaves]
        id, *leaves = on_host(_read, [self.id, *shapes], self.id, index)
        return Filed(id, self.layout), self.layout.structure.unflatten(leaves)

    def write(self, index: Int[Array, " cohort"], present: Bool[Array, " cohort"], states: PyTree) -> Filed:
        """What follows, when the states of those who are present are written; a client that is there twice has one."""
        cast = [leaf.astype(one.dtype) for leaf, one in zip(jax.tree.leaves(states), self.layout.leaves, strict=True)]
        (id,) = on_host(_write, [self.id], self.id, index, present, *cast)
        return Filed(id, self.layout)


_numbers = itertools.count()
_open: weakref.WeakValueDictionary[int, Store] = weakref.WeakValueDictionary()


def _read(id: np.ndarray, index: Index) -> Sequence[np.ndarray]:
    store = _open[int(id)]
    with _told(store):
        return [id, *store.layout.unpacked(store.read(index))]


def _write(
    id: np.ndarray, index: Index, present: Bool[np.ndarray, " cohort"], *leaves: np.ndarray
) -> Sequence[np.ndarray]:
    store = _open[int(id)]
    with _told(store):
        own, first = np.unique(index[present], return_index=True)
        store.write(own, store.layout.packed([leaf[present] for leaf in leaves])[first])
        return [id]


@contextlib.contextmanager
def _told(store: Store) -> Iterator[None]:
    """Keeps for the run what an access fails with: of a compiled program comes a text alone."""
    try:
        yield
    except BaseException as error:
        store.error = error
        raise


class _File:
    """Rows of a file, read and written by their numbers: where these follow each other, at once.

    Not mapped into memory: a full disk is then an error, not the end of the process.
    """

    def __init__(self, file: RawIOBase, kind: np.dtype):
        self._file, self._kind = file, kind

    def read(self, index: Index) -> Bytes:
        rows = np.zeros(index.size, self._kind)  # what was never written is zeros
        for place, view in self._runs(index, rows):
            self._file.seek(place)
            while len(view) and (done := self._file.readinto(view)):
                view = view[done:]
        return rows

    def write(self, index: Index, rows: Bytes) -> None:
        for place, view in self._runs(index, np.ascontiguousarray(rows)):
            self._file.seek(place)
            while len(view):
                view = view[self._file.write(view) :]

    def _runs(self, index: Index, rows: Bytes) -> Iterator[tuple[int, memoryview]]:
        if not index.size:
            return
        view, width = rows.view(np.uint8).reshape(-1).data, self._kind.itemsize
        ends = [*(np.flatnonzero(np.diff(index) != 1) + 1).tolist(), index.size]
        first = 0
        for end in ends:
            yield int(index[first]) * width, view[first * width : end * width]
            first = end
