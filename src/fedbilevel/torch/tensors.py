"""Tensors for x, y and rows, and numbers as tensors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
from jaxtyping import PyTree
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from ..errors import InputError, check
from ..foreign import Foreign

_TOGETHER = 1024  # rows of a data set that are read at a time

with warnings.catch_warnings():  # torch warns once of an array that it must not write to; ours are read alone
    warnings.simplefilter("ignore")
    _read_only = np.zeros(1)
    _read_only.flags.writeable = False
    torch.from_numpy(_read_only)


class Tensors(Foreign):
    """What `fedbilevel.foreign` asks of a library, of PyTorch."""

    name = "torch"

    def owns(self, leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor)

    def variable(self, leaf: torch.Tensor, where: str) -> np.ndarray:
        kind = str(leaf.dtype).removeprefix("torch.")
        check(
            leaf.layout is torch.strided and not leaf.is_quantized,
            f"{where} is a tensor of layout {leaf.layout}: pass a dense one, tensor.to_dense().",
        )
        check(leaf.device.type != "meta", f"{where} is on the device meta, without numbers: give the module a device.")
        check(
            leaf.dtype.is_floating_point or leaf.dtype.is_complex,
            f"{where} is {kind}, and only floating-point tensors are optimised: leave it out (a module's buffers, such as "
            "num_batches_tracked, are not among fedbilevel.torch.parameters(module)).",
        )
        wide = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
        check(
            leaf.dtype is not torch.float64 or wide,
            f"{where} is float64, and JAX holds 32 bits here: pass tensor.float(), or call "
            'jax.config.update("jax_enable_x64", True) first.',
        )
        return _copied(leaf)

    def given_back(self, array: np.ndarray) -> torch.Tensor:
        return tensor_of(array)

    def data_set(self, rows: Any) -> bool:
        return isinstance(rows, (Dataset, DataLoader))

    def rows(self, rows: PyTree) -> PyTree:
        if self.data_set(rows):
            rows = _read(rows)
        leaves, structure = jax.tree.flatten(rows)
        if not any(map(self.owns, leaves)):
            return rows
        return jax.tree.unflatten(structure, [numbers(leaf) if self.owns(leaf) else leaf for leaf in leaves])


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """An array as a tensor, in the array's memory."""
    if array.dtype.kind == "V":  # bfloat16, of which torch's numpy knows nothing
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def kept_rows(array: np.ndarray) -> torch.Tensor:
    """Rows as a tensor, in the array's memory (but for uint32, with which torch can do next to nothing)."""
    return tensor_of(array if array.dtype != np.uint32 else array.astype(np.int64))


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Rows as a loss takes them: whole numbers of 32 bits are of 64, for those are torch's labels and indices."""
    return tensor.long() if tensor.dtype is torch.int32 else tensor


def rows_of(array: np.ndarray) -> torch.Tensor:
    """Some rows as a loss takes them."""
    return as_rows(kept_rows(array))


def _copied(tensor: torch.Tensor) -> np.ndarray:
    """The numbers of a tensor, in memory of their own."""
    return np.array(numbers(tensor))


def numbers(tensor: torch.Tensor) -> np.ndarray:
    """The numbers of a tensor, in its memory where they can be."""
    tensor = tensor.detach().to("cpu").resolve_conj().resolve_neg()
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _read(rows: Dataset | DataLoader) -> PyTree:
    """All rows of a data set, in order."""
    collate = default_collate
    if isinstance(rows, DataLoader):
        rows, collate = rows.dataset, rows.collate_fn
    if isinstance(rows, TensorDataset):
        return rows.tensors
    kind = type(rows).__name__
    if isinstance(rows, IterableDataset) or not hasattr(rows, "__len__"):
        raise InputError(
            f"a {kind} has no length, and rows are drawn by their number: pass a data set with __len__ and "
            "__getitem__, or a list of tensors, rows first."
        )
    count = len(rows)  # pyright: ignore[reportArgumentType]
    check(count > 0, f"a {kind} has no rows: leave that client out.")
    try:
        parts = [
            collate([rows[k] for k in range(first, min(first + _TOGETHER, count))])
            for first in range(0, count, _TOGETHER)
        ]
        plain = [_plain(part) for part in parts]
        return jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *plain)
    except Exception as error:  # whatever the user's data set raises
        text = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"the rows of a {kind} cannot be put together ({type(error).__name__}: {text}): each has to be a tensor, or a "
            "tuple or a dict of tensors and numbers, all of the same shapes."
        ) from error


def _plain(part: PyTree) -> PyTree:
    """What collating gives: tuples become lists there, and are tuples again, as a TensorDataset's."""
    if isinstance(part, torch.Tensor):
        return numbers(part)
    if isinstance(part, Mapping):
        return {key: _plain(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return tuple(_plain(value) for value in part)
    return part
