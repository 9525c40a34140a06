"""The value of a loss on one client's rows, and its derivatives, by PyTorch's autograd.

Second derivatives are taken by double backward: on processors it is several times faster than forward over reverse, and
more operations have it (`layers`). Where it is missing the other way is taken.

    double backward:       H v = d_y <d_y g, v>,             J v = d_x <d_y g, v>, each in reverse over reverse
    forward over reverse:  H v = d/de d_y g(x, y + e v),     J v = d_x d/de g(x, y + e v)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import PyTree
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..arrays import Structure
from ..owned import bare

Way: TypeAlias = Literal["double backward", "forward over reverse"]
Loss: TypeAlias = Callable[..., Any]  # (x, y, batch, weights) -> scalar
Leaves: TypeAlias = Sequence[torch.Tensor]

WAYS: tuple[Way, ...] = ("double backward", "forward over reverse")


class At(NamedTuple):
    """A loss of x and y, on some rows.

    Attributes:
        loss: (x, y, batch, weights) -> scalar.
        like_x, like_y: the structures of x and y.
        x, y: their leaves.
        batch, weights: the rows and their weights.
    """

    loss: Loss
    like_x: Structure
    like_y: Structure
    x: Leaves
    y: Leaves
    batch: PyTree
    weights: torch.Tensor

    def value(self, x: Leaves, y: Leaves) -> torch.Tensor:
        """The loss."""
        given = bare(self.like_x.unflatten(x)), bare(self.like_y.unflatten(y))
        return self.loss(*given, self.batch, self.weights)


def value(at: At) -> list[torch.Tensor]:
    """The loss; it may take derivatives itself, and so is given variables that have them."""
    return [at.value(_variables(at.x), _variables(at.y)).detach()]


def gradient(at: At, of: Literal["x", "y", "xy"]) -> list[torch.Tensor]:
    """d_x, d_y or both, like the leaves."""
    x = _variables(at.x) if "x" in of else at.x
    y = _variables(at.y) if "y" in of else at.y
    wrt = [*(x if "x" in of else ()), *(y if "y" in of else ())]
    return _derivative(at.value(x, y), wrt)


def product(at: At, v: Leaves, of: Literal["x", "y"], way: Way) -> list[torch.Tensor]:
    """d2_yy g v (of="y"), or d2_xy g v (of="x")."""
    with sdpa_kernel(SDPBackend.MATH):  # attention's faster kernels have first derivatives alone
        return (_twice_backward if way == "double backward" else _forward_over_reverse)(at, v, of)


def _variables(leaves: Leaves) -> list[torch.Tensor]:
    return [leaf.detach().requires_grad_() for leaf in leaves]


def _derivative(total: torch.Tensor, wrt: Leaves) -> list[torch.Tensor]:
    """Of a scalar; zero where it does not depend on a leaf."""
    if not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in wrt]
    found = torch.autograd.grad(total, wrt, allow_unused=True)
    return [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(wrt, found, strict=True)]


class _Along(torch.autograd.Function):
    """A number whose derivatives by `slopes` are `directions`.

    `torch.autograd.grad` takes directions itself, and imports sympy, 37 MB of it, to look at their shapes.
    """

    @staticmethod
    def forward(ctx: Any, directions: Leaves, *slopes: torch.Tensor) -> torch.Tensor:
        ctx.directions = directions
        return slopes[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, *ctx.directions)


def _twice_backward(at: At, v: Leaves, of: Literal["x", "y"]) -> list[torch.Tensor]:
    x, y = (_variables(at.x) if of == "x" else at.x), _variables(at.y)
    total, wrt = at.value(x, y), x if of == "x" else y
    if not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in wrt]
    first = torch.autograd.grad(total, y, create_graph=True, allow_unused=True)
    moving = [(one, along) for one, along in zip(first, v, strict=True) if one is not None and one.requires_grad]
    if not moving:  # linear in y
        return [torch.zeros_like(leaf) for leaf in wrt]
    slopes, directions = zip(*moving, strict=True)
    second = torch.autograd.grad(_Along.apply(directions, *slopes), wrt, allow_unused=True)
    return [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(wrt, second, strict=True)]


def _forward_over_reverse(at: At, v: Leaves, of: Literal["x", "y"]) -> list[torch.Tensor]:
    x, y, v = tuple(at.x), tuple(at.y), tuple(v)
    if of == "y":
        slope = torch.func.grad(lambda y: at.value(x, y))
        return list(torch.func.jvp(slope, (y,), (v,))[1])
    along = lambda x: torch.func.jvp(lambda y: at.value(x, y), (y,), (v,))[1]
    return list(torch.func.grad(along)(x))
