"""What a model says of new rows, at the x and y that a run returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .arrays import on_device
from .errors import InputError, check
from .foreign import library_of, native
from .given import Whole, whole_number
from .problem import describe

Model = Callable[..., PyTree]


@runtime_checkable
class Prepared(Protocol):
    """Makes rows of what users have, such as a table, as it did before training."""

    def rows(self, given: Any) -> PyTree:
        """Rows: a pytree of arrays, rows first."""


def predict(
    model: Model,
    x: PyTree,
    y: PyTree,
    rows: PyTree,
    prepared: Prepared | None = None,
    batched: bool = False,
    batch_size: Whole = 1024,
) -> PyTree:
    """What a model says of each row, as `Result.predict`.

    Raises:
        InputError: as `Result.predict`.
    """
    check(callable(model), f"predict(model) is a function of (x, y, row); got {model!r}.")
    check(
        prepared is None or isinstance(prepared, Prepared),
        f"predict(prepared=...) has a method rows(table); got {type(prepared).__name__}.",
    )
    size = whole_number(batch_size, 1, "batch_size= is a whole number of at least 1")
    rows = rows if prepared is None else prepared.rows(rows)
    if any(library_of(leaf) is not None for leaf in jax.tree.leaves((x, y))):  # its model takes a batch, and is its own
        return model(x, y, rows)
    rows = jax.tree.map(_array, native(rows))
    counts = {len(leaf) if np.ndim(leaf) else None for leaf in jax.tree.leaves(rows)}
    check(
        len(counts) == 1 and counts != {None},
        lambda: f"rows of predict are a pytree of arrays, rows first, equally many; got {describe(rows)}.",
    )
    (many,) = counts
    check(bool(many), "there are no rows to predict: pass at least one.")
    return _in_batches(model, x, y, rows, int(many or 0), size, batched)


def _in_batches(model: Model, x: PyTree, y: PyTree, rows: PyTree, many: int, size: int, batched: bool) -> PyTree:
    size = min(size, many)
    of = lambda rows: model(x, y, rows)
    compiled = eqx.filter_jit(of if batched else jax.vmap(of))
    found = []
    for first in range(0, many, size):
        place = np.minimum(np.arange(first, first + size), many - 1)  # the last batch is filled with its last row
        part = jax.tree.map(lambda leaf, place=place: on_device(np.asarray(leaf)[place]), rows)
        try:
            out = compiled(part)
        except Exception as error:  # whatever the user's model raises
            raise InputError(f"the model failed on {describe(part)}: {type(error).__name__}: {error}") from error
        _check_rows_first(out, size)
        found.append(jax.tree.map(lambda leaf, first=first: leaf[: many - first], out))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)


def _array(leaf: Any) -> Any:
    return leaf if eqx.is_array(leaf) else np.asarray(leaf)


def _check_rows_first(out: PyTree, size: int) -> None:
    leaves = jax.tree.leaves(out)
    good = leaves and all(eqx.is_array(leaf) and leaf.ndim and leaf.shape[0] == size for leaf in leaves)
    check(
        good,
        lambda: (
            f"the model must return arrays, with batched=True rows first, {size} of them; it returned {describe(out)}."
        ),
    )
