"""A bilevel problem whose losses are PyTorch's, behind the oracles that every algorithm knows."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Array, Float, Int, PyTree

from .. import problem as base
from ..arrays import on_device
from ..beside import Served
from ..data import FederatedData
from ..errors import InputError, check
from ..jaxprs import each_on_host
from ..owned import own
from ..problem import Rows, describe, told_by
from .host import Asked, Host, Metric, Name, Numbers


class Problem(base.Problem):
    """A bilevel problem in PyTorch.

    Args:
        inner: g(x, y, batch, weights) -> scalar, the lower-level loss of a batch of rows: the mean over its rows with
            these weights, (rows,), which sum to one. There is no padding among the rows.
        outer: f(x, y, batch, weights) -> scalar, the upper-level loss, likewise.

    x and y are pytrees of tensors, dicts of parameters by name say (`parameters`), and results come back as such. A batch
    is a client's rows as they were given, tensors with rows first: a tuple for a `TensorDataset`. Second derivatives are
    taken by double backward where the operations of the loss have it, else by forward over reverse.

    Algorithms, engines and the rest of the library take it like any `fedbilevel.Problem`; the numbers are those of the
    same losses in JAX. What is drawn (cohorts, rows) is drawn by the run's key; torch draws nothing.
    """

    on_host: ClassVar[bool] = True

    inner: Callable[..., Any]  # for type checkers: it gives a tensor
    outer: Callable[..., Any] | None = None
    batched: bool = eqx.field(static=True, init=False, default=True)
    features: None = eqx.field(init=False, default=None)
    random: bool = eqx.field(static=True, init=False, default=False)
    outer_means: None = eqx.field(init=False, default=None)
    outer_of: None = eqx.field(init=False, default=None)
    host: Host = eqx.field(init=False)
    number: Int[Array, ""] = eqx.field(init=False)

    def __post_init__(self):
        for level in ("inner", "outer"):
            loss = getattr(self, level)
            check(
                callable(loss) and not isinstance(loss, torch.nn.Module),
                f"fedbilevel.torch.Problem({level}=...) takes a function (x, y, batch, weights) -> scalar, not "
                f"{'a module' if isinstance(loss, torch.nn.Module) else repr(loss)}.",
            )
        assert self.outer is not None  # it is callable
        self.host = Host(self.inner, self.outer)
        self.number = on_device(np.asarray(self.host.number, np.int32))

    def over(self, x_rest: PyTree, y_rest: PyTree) -> Problem:
        odd = [(name, rest) for name, rest in (("x", x_rest), ("y", y_rest)) if jax.tree.leaves(rest)]
        name, rest = odd[0]
        path, leaf = jax.tree_util.tree_flatten_with_path(rest)[0][0]
        raise InputError(
            f"{name}{jax.tree_util.keystr(path)} is {describe(leaf)}, and the variables of a problem in torch are "
            "floating-point tensors alone: leave it out, and let the loss have it from elsewhere."
        )

    def holding(self, data: FederatedData) -> tuple[Problem, FederatedData]:
        if isinstance(data.inner.rows, Numbers):
            return self, data
        count = lambda level: len(jax.tree.leaves(level.rows)[0])
        first = count(data.inner)
        numbered = lambda level, start: dataclasses.replace(level, rows=_numbers(start, count(level)))
        standing = dataclasses.replace(data, inner=numbered(data.inner, 0), outer=numbered(data.outer, first))
        return self._with(self.host.bound(data)), standing

    def settled(self, x: PyTree, y: PyTree, data: FederatedData) -> Problem:
        return self._with(self.host.looked_at(own(x, 0), own(y, 0), data))

    def depends(self, level: str, variable: str) -> list[bool] | None:
        return self.host.known.depends.get((level, variable))

    def ways(self, x: PyTree, y: PyTree, v: PyTree, rows: Rows) -> dict[str, PyTree]:
        return self.host.products(x, y, v, rows)

    def serving(self, program: Callable[[], PyTree]) -> PyTree:
        if torch.get_num_threads() == 1:  # then there are no threads to stand in each other's way
            return program()
        before, self.host.served = self.host.served, (served := Served())
        try:
            return served.run(program)
        finally:
            self.host.served = before

    def told(self) -> Exception | None:
        return self.host.told()

    def _with(self, host: Host) -> Problem:
        other = copy.copy(self)
        object.__setattr__(other, "host", host)
        object.__setattr__(other, "number", on_device(np.asarray(host.number, np.int32)))
        return other

    def measuring(self, function: Callable, x: PyTree, y: PyTree, data: FederatedData) -> Measuring:
        found = self.host.tried(function, x, y, data)
        several = isinstance(found, tuple | list)
        values = [torch.as_tensor(each) for each in (found if several else (found,))]
        shapes = [tuple(each.shape) for each in values]
        check(
            len(values) in (1, 2) and not any(shapes) and not any(map(torch.is_complex, values)),
            f"it returned tensors of shapes {', '.join(map(str, shapes))}",
        )
        return Measuring(tuple(Metric(function, k if several else None) for k in range(len(values))))

    # The oracles ----------------------------------------------------------------------------------------------------

    def inner_value(self, x: PyTree, y: PyTree, rows: Rows) -> Float[Array, ""]:
        return self._ask("inner_value", _number(x, y), x, y, rows)

    def outer_value(self, x: PyTree, y: PyTree, rows: Rows) -> Float[Array, ""]:
        return self._ask("outer_value", _number(x, y), x, y, rows)

    def inner_gradient(self, x: PyTree, y: PyTree, rows: Rows) -> PyTree:
        return self._ask("inner_gradient", y, x, y, rows)

    def inner_gradient_x(self, x: PyTree, y: PyTree, rows: Rows) -> PyTree:
        return self._ask("inner_gradient_x", x, x, y, rows)

    def hessian_vector(self, x: PyTree, y: PyTree, v: PyTree, rows: Rows) -> PyTree:
        return self._ask("hessian_vector", y, x, y, rows, v)

    def cross_vector(self, x: PyTree, y: PyTree, v: PyTree, rows: Rows) -> PyTree:
        return self._ask("cross_vector", x, x, y, rows, v)

    def outer_gradients(self, x: PyTree, y: PyTree, rows: Rows) -> tuple[PyTree, PyTree]:
        return self._ask("outer_gradients", (x, y), x, y, rows)

    def _ask(self, name: Name, like: PyTree, x: PyTree, y: PyTree, rows: Rows, *v: PyTree, metric: str = "") -> PyTree:
        numbered = isinstance(rows.examples, Numbers)
        structure = () if numbered else (jax.tree.structure(rows.examples),)
        self.host.check_second(name)
        asked = Asked(name, self.host.says, jax.tree.structure(x), jax.tree.structure(y), structure, metric)
        leaves, out = jax.tree.flatten(like)
        leaves = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        given = jax.tree.leaves((x, y, *v, rows.examples, rows.weights, rows.count))
        with told_by(self):
            found = each_on_host(asked, leaves, self.number, *map(jnp.asarray, given))
        return jax.tree.unflatten(out, found)


@dataclasses.dataclass(frozen=True)
class Measuring:
    """A metric of a batch, as a program asks for it; equal to others that compute the same."""

    metrics: tuple[Metric, ...] = dataclasses.field(compare=False)
    says: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "says", tuple(each.says for each in self.metrics))

    def __call__(self, problem: Problem, x: PyTree, y: PyTree, rows: Rows) -> tuple[Array, ...]:
        """Its number, or the two of a pair, with the rows' weights."""
        like = jax.ShapeDtypeStruct((), jax.tree.leaves(y)[0].dtype)
        return tuple(problem._ask("outer_value", like, x, y, rows, metric=says) for says in self.says)


def _number(x: PyTree, y: PyTree) -> jax.ShapeDtypeStruct:
    """A scalar of the type of a loss."""
    return jax.ShapeDtypeStruct((), jnp.result_type(*jax.tree.leaves((x, y))))


def _numbers(start: int, count: int) -> Numbers:
    return Numbers(on_device(np.arange(start, start + count, dtype=np.int32)))
