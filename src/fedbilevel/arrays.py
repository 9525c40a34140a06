"""Arrays on the device; and on disk, bit for bit: numpy's format, and in it the names of types that numpy does not know.

`np.save` writes bfloat16, float8, int4 and their like as void bytes. Here the header of an array
names its type (`'descr': 'bfloat16'`), which `np.load` understands once jax (or ml_dtypes) is
imported. Random keys are written as the numbers that they are made of.
"""

from __future__ import annotations

import abc
import io
import math
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeGuard, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from numpy.lib import format as npy
from numpy.typing import ArrayLike, DTypeLike

_LARGE = 2**20  # bytes
_ALIGNED = 64  # bytes

Concrete = jax.Array | np.ndarray | np.generic  # what is written


@runtime_checkable
class Writes(Protocol):
    """A file to write bytes to."""

    def write(self, data: bytes, /) -> int: ...


@runtime_checkable
class Reads(Protocol):
    """A file to read bytes from."""

    def read(self, size: int = -1, /) -> bytes: ...

    def seek(self, place: int, /) -> int: ...

    def tell(self) -> int: ...


@runtime_checkable
class Structure(Protocol):
    """The structure of a pytree: `jax.tree_util.PyTreeDef`, which tells type checkers nothing."""

    @property
    def num_leaves(self) -> int:
        """How many leaves it has."""
        ...

    def unflatten(self, leaves: Iterable[PyTree], /) -> PyTree:
        """The pytree with these leaves."""
        ...

    def flatten_up_to(self, tree: PyTree, /) -> list[PyTree]:
        """What a pytree has where this one has leaves.

        Raises:
            ValueError: it is of another structure.
        """
        ...


class Elsewhere(abc.ABC):
    """A leaf that stands for arrays (rows, ...) that need not be in memory, of which only some rows say something."""

    @property
    @abc.abstractmethod
    def count(self) -> int:
        """How many arrays `write` writes."""

    @abc.abstractmethod
    def write(self, file: Writes) -> None:
        """The numbers of the rows that say something, and of each array these rows."""

    @abc.abstractmethod
    def restored(self, found: Sequence[np.ndarray]) -> Elsewhere:
        """One like this, of what `write` wrote (`Touched`), or of whole arrays."""


class Touched(list[np.ndarray]):
    """What an `Elsewhere` wrote: the numbers of rows, and arrays of these rows."""


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array for numbers to come, which JAX on a processor will hold as it is, without a copy.

    It begins at a multiple of 64 bytes, as JAX asks; and a long one lies in large pages, as numpy asks of Linux.
    """
    size = math.prod(shape) * dtype.itemsize
    space = np.empty(size + _ALIGNED, np.uint8)
    begin = -space.ctypes.data % _ALIGNED
    return space[begin : begin + size].view(dtype).reshape(shape)


def on_device(array: np.ndarray) -> jax.Array:
    """A numpy array as JAX holds it. (`jnp.asarray` without a dtype compiles a program for every shape, in jax 0.10.)"""
    return jnp.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype))


def held(values: ArrayLike, dtype: DTypeLike = float) -> jax.Array:
    """Numbers as JAX holds those of this type: in 32 bits, or in 64 with `jax_enable_x64`."""
    return on_device(np.asarray(values, jax.dtypes.canonicalize_dtype(dtype)))


def entry(leaf: jax.Array, index: jax.Array | int) -> jax.Array:
    """`leaf[index]` for indices known to lie in it, without the look at negative ones, of which a run would be full."""
    return leaf.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def is_key(leaf: PyTree) -> TypeGuard[jax.Array]:
    """Whether a leaf is a `jax.random.key`, or several."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def numbers(leaf: Concrete) -> np.ndarray:
    """An array (or a random key) as a numpy array."""
    return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)


def write(file: Writes, array: np.ndarray) -> None:
    """One array, as `np.save` does, but with the name of a type that numpy does not know."""
    array = np.ascontiguousarray(array).reshape(array.shape)  # the former makes () to (1,)
    if array.dtype.isbuiltin != 2:  # numpy's own
        npy.write_array(file, array, allow_pickle=False)
        return
    write_header(file, array.shape, array.dtype)
    file.write(array.tobytes())


def write_header(file: Writes, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """What stands before an array's bytes."""
    name = dtype.name if dtype.isbuiltin == 2 else npy.dtype_to_descr(dtype)
    npy.write_array_header_1_0(file, {"descr": name, "fortran_order": False, "shape": shape})


def write_named(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Arrays by name in one file, for `np.load`: as `np.savez`."""
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                write(file, array)


def leaves_of(tree: PyTree) -> list[Concrete]:
    """The arrays among a pytree's leaves."""
    return [leaf for leaf in jax.tree.leaves(tree) if _is_array(leaf)]


def count_of(part: PyTree) -> int:
    """How many arrays `write_leaves` writes."""
    return part.count if isinstance(part, Elsewhere) else len(leaves_of(part))


def write_leaves(file: Writes, part: PyTree) -> None:
    """The arrays among a pytree's leaves, one after the other; or what is elsewhere."""
    if isinstance(part, Elsewhere):
        part.write(file)
        return
    for leaf in leaves_of(part):
        write(file, numbers(leaf))


def read_leaves(file: Reads, count: int) -> list[np.ndarray]:
    """So many arrays; large ones stay in the file until they are looked at."""
    return [_read(file) for _ in range(count)]


def _read(file: Reads) -> np.ndarray:
    begin = file.tell()
    if isinstance(file, io.BufferedReader) and npy.read_magic(file) == (1, 0):
        shape, _, dtype = npy.read_array_header_1_0(file)
        size = math.prod(shape) * dtype.itemsize
        if size > _LARGE:
            place = file.tell()
            found = np.memmap(file, dtype, "r", place, shape)  # which moves on to some other place
            file.seek(place + size)
            return found
    file.seek(begin)
    return npy.read_array(file, allow_pickle=False)


def restore(like: PyTree, found: Sequence[np.ndarray]) -> PyTree:
    """A pytree like `like`, with the arrays that `write_leaves` wrote in place of its own (of the rows that say nothing,
    those of `like` stay).

    Raises:
        ValueError: they are other arrays than those of `like`, by number, shape or dtype.
    """
    if isinstance(like, Elsewhere):
        return like.restored(found)
    if isinstance(found, Touched):
        found = _with_rows(like, found)
    leaves, structure = jax.tree.flatten(like)
    expected = sum(map(_is_array, leaves))
    if expected != len(found):
        raise ValueError(f"{len(found)} arrays where {expected} belong")
    left = iter(found)
    back = [_like(leaf, next(left)) if _is_array(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(structure, back)


def _with_rows(like: PyTree, touched: Touched) -> list[np.ndarray]:
    index, *rows = touched
    whole = [np.array(numbers(leaf)) for leaf in leaves_of(like)]
    for leaf, new in zip(whole, rows, strict=True):
        leaf[index] = new
    return whole


def _is_array(leaf: PyTree) -> TypeGuard[Concrete]:
    return isinstance(leaf, Concrete)


def _like(leaf: Concrete, found: np.ndarray) -> Concrete:
    wanted = numbers(leaf)
    found = np.array(found) if isinstance(found, np.memmap) else found
    if found.dtype.kind == "V" and found.dtype.itemsize == wanted.dtype.itemsize:
        found = found.view(wanted.dtype)  # as earlier versions wrote what numpy does not know
    if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        raise ValueError(f"{_shown(found)} where {_shown(wanted)} belongs")
    if is_key(leaf):
        return jax.random.wrap_key_data(on_device(found), impl=jax.random.key_impl(leaf))
    return on_device(found) if isinstance(leaf, jax.Array) else found


def _shown(array: np.ndarray) -> str:
    return f"{array.dtype}{list(array.shape)}"
