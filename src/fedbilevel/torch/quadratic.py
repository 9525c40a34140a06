"""The task `quadratic` in PyTorch, for the test of an installation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike

from .problem import Problem

Rows = Mapping[str, torch.Tensor]


def inner_loss(x: torch.Tensor, y: torch.Tensor, rows: Rows, weights: torch.Tensor, /) -> torch.Tensor:
    """The rows' quadratics in y."""
    curved = torch.einsum("i,nij,j->n", y, rows["H"], y)
    return weights @ (0.5 * curved - (rows["B"] @ x + rows["b"]) @ y)


def outer_loss(x: torch.Tensor, y: torch.Tensor, rows: Rows, weights: torch.Tensor, /) -> torch.Tensor:
    """Half the squared distance to the rows' targets, plus a small penalty on x."""
    return weights @ (0.5 * ((y - rows["t"]) ** 2).sum(1) + 0.05 * (x**2).sum())


def made(*variables: ArrayLike) -> tuple[Problem, list[torch.Tensor]]:
    """The problem, and variables as tensors."""
    return Problem(inner_loss, outer_loss), [torch.tensor(np.asarray(each)) for each in variables]
