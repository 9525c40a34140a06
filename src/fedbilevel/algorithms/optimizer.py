"""The old functions of `outer_optimizer=`; `components/optimizer.py` is what stays."""

from __future__ import annotations

from typing import Any

from jaxtyping import PyTree

from .components.optimizer import NAMED as NAMED
from .components.optimizer import OuterOptimizer
from .components.optimizer import resolve as resolve


def begin(optimizer: Any, x: PyTree) -> dict[str, PyTree]:
    """What the state keeps of the optimizer at the start."""
    return {} if optimizer is None else {"optimizer": OuterOptimizer(optimizer).begin(x)}


def outer_step(optimizer: Any, x: PyTree, mean: PyTree, kept: dict[str, PyTree]) -> tuple[PyTree, dict[str, PyTree]]:
    """(The next x, what is kept) from the mean of the clients' x_i."""
    if optimizer is None:
        return mean, kept
    x, after = OuterOptimizer(optimizer).step(x, mean, kept["optimizer"])
    return x, {**kept, "optimizer": after}
