"""What `testing.check_problem` looks at: a problem's losses and oracles at a point where nothing is zero.

The rows are a client's own, with unequal weights and with padding behind them, as engines hand them over.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from .data import FederatedData
from .indices import outside
from .oracles import around_all
from .owned import own
from .problem import Problem, Rows

_PADDING = 2  # rows of weight zero behind the client's own
_STEP = 1e-5  # of central differences
_SHIFTS = (0.3, 0.03, 0.003)  # how far the point is moved, in the size of x and y or 1 where they are zero

Scalar = Float[Array, ""]
Verdict = tuple[bool, str]  # whether it holds, and the figure
Check = tuple[str, Callable[[], Verdict]]  # what is checked, and how
Twice = tuple[str, Callable[[], Scalar], Callable[[], Scalar]]  # what is compared, and both ways to it


class Point(NamedTuple):
    """Where a problem is looked at: x and y, and random directions like them."""

    x: PyTree
    y: PyTree
    dx: PyTree
    dy: PyTree
    v: PyTree


def checks(problem: Problem, data: FederatedData, x: PyTree, y: PyTree, tolerance: float) -> Iterator[Check]:
    """Every check of a problem on its first clients and on all rows' indices."""
    keys, names = jax.random.split(jax.random.key(0), 5), data.names
    problem = around_all(problem, data, x, y)  # a client's own means may have no group in their denominators
    for level in ("inner", "outer"):
        for client in range(data.clients):
            yield f"{names[client]}: {level} indices", _indices(problem, data, level, client, *own((x, y), client))
    everybodys = x, y
    for client in range(min(data.clients, 3)):
        x, y = own(everybodys, client)
        inner, outer = (weighted(getattr(data, level).alone(client).all(), client) for level in ("inner", "outer"))
        x0, y0 = _moved(problem, x, y, keys, inner, outer)
        at = Point(x0, y0, *(_unit(_direction(key, like)) for key, like in zip(keys[:3], (x, y, y), strict=True)))
        for level, rows in (("inner", inner), ("outer", outer)):
            yield f"{names[client]}: {level} weights", _means(problem, level, at, rows, tolerance)
        for what, exact, difference in _comparisons(problem, at, inner, outer):
            yield (
                f"{names[client]}: {what}",
                lambda e=exact, d=difference: _close(float(e()), float(d()), tolerance),
            )
        for where, x1, y1 in (("at the start", x, y), ("beside it", x0, y0)):
            if type(problem).ways is not Problem.ways:
                what = f"{names[client]}: hessian_vector in each way, {where}"
                yield what, _each_way(problem, at._replace(x=x1, y=y1), inner, tolerance)
        curvature = lambda x=x, y=y, n=inner, v=at.v: float(_dot(v, problem.hessian_vector(x, y, v, n)))
        yield (
            f"{names[client]}: inner loss curves upwards",
            lambda c=curvature: (c() > 0, f"curvature {c():.3g} along a direction"),
        )


def weighted(rows: Rows, seed: int) -> Rows:
    """Rows with unequal weights of the same sum, and padding: repeats of the last row, of weight zero."""
    count = int(rows.count)
    draw = np.random.default_rng(seed).uniform(0.5, 1.5, count)
    weights = jnp.asarray(np.append(draw / draw.sum(), np.zeros(_PADDING)), rows.weights.dtype) * jnp.sum(rows.weights)
    place = np.minimum(np.arange(count + _PADDING), count - 1)
    examples = jax.tree.map(lambda leaf: leaf[place], rows.examples)
    return Rows(examples, weights, rows.count, key=jax.random.key(seed))


def _means(problem: Problem, level: str, at: Point, rows: Rows, tolerance: float) -> Callable[[], Verdict]:
    """Whether the loss of all rows is the weighted mean of its values for each row alone."""

    def check() -> tuple[bool, str]:
        value = getattr(problem, f"{level}_value")
        total = jnp.sum(rows.weights)
        whole, parts = float(value(at.x, at.y, rows)), 0.0
        for row in range(int(rows.count)):
            alone = jax.tree.map(lambda leaf, r=row: leaf[r : r + 1], rows.examples)
            place = jnp.full((1,), row, jnp.int32)
            one = Rows(alone, jnp.reshape(total, (1,)), jnp.ones((), jnp.int32), key=rows.key, place=place)
            parts += float(rows.weights[row] / total) * float(value(at.x, at.y, one))
        good, detail = _close(whole, parts, tolerance)
        return good, f"{detail}, the weighted mean over rows without the padding" if not good else detail

    return check


def _each_way(problem: Problem, at: Point, rows: Rows, tolerance: float) -> Callable[[], Verdict]:
    """Whether a product with the Hessian is the same in every way to take it, and symmetric in each."""

    def check() -> Verdict:
        one, other = (problem.ways(at.x, at.y, v, rows) for v in (at.v, at.dy))
        found = {
            name: (float(_dot(at.dy, one[name])), float(_dot(at.v, other[name]))) for name in one.keys() & other.keys()
        }
        figures = [figure for pair in found.values() for figure in pair]
        good = all(_close(figures[0], figure, tolerance)[0] for figure in figures)
        told = "; ".join(f"{name} {a:.9g}, turned round {b:.9g}" for name, (a, b) in sorted(found.items()))
        return good, told if figures else "there is none"

    return check


def _indices(
    problem: Problem, data: FederatedData, level: str, client: int, x: PyTree, y: PyTree
) -> Callable[[], Verdict]:
    """Whether the loss of a client's rows indexes arrays within their bounds."""

    def check() -> tuple[bool, str]:
        rows = getattr(data, level).alone(client).all()
        rows = dataclasses.replace(rows, key=jax.random.key(0))
        found = outside(lambda x, y: getattr(problem, f"{level}_value")(x, y, rows), x, y)
        if not found:
            return True, "within their arrays"
        index, size = found[0]
        return False, (
            f"the {level} loss uses index {index} on an axis of {size}, and XLA clamps or drops it in silence: mend the "
            f"rows, or guard the index in the loss, as in x[jnp.clip(row['id'], 0, {size - 1})]"
        )

    return check


def _moved(
    problem: Problem, x: PyTree, y: PyTree, keys: Key[Array, " draws"], inner: Rows, outer: Rows
) -> tuple[PyTree, PyTree]:
    """x and y moved at random, so that nothing is zero by chance; less far where the losses are not finite there."""
    for shift in _SHIFTS:
        at = _shifted(x, keys[3], shift), _shifted(y, keys[4], shift)
        if np.isfinite([float(problem.inner_value(*at, inner)), float(problem.outer_value(*at, outer))]).all():
            return at
    return x, y


def _shifted(tree: PyTree, key: Key[Array, ""], shift: float) -> PyTree:
    size = lambda leaf: jnp.where(jnp.any(leaf != 0), jnp.sqrt(jnp.mean(leaf**2)), 1.0)
    return jax.tree.map(lambda leaf, d: leaf + shift * size(leaf) * d, tree, _direction(key, tree))


def _comparisons(problem: Problem, at: Point, inner: Rows, outer: Rows) -> list[Twice]:
    x, y, dx, dy, v = at
    move = lambda start, d, s: jax.tree.map(lambda a, b: a + s * _STEP * b, start, d)
    along = lambda f: (f(1.0) - f(-1.0)) / (2 * _STEP)
    grad_y = lambda x, y: problem.inner_gradient(x, y, inner)
    hessian = lambda d: problem.hessian_vector(x, y, d, inner)
    direct = lambda place: problem.outer_gradients(x, y, outer)[place]
    f = lambda x, y: problem.outer_value(x, y, outer)
    g = lambda y: problem.inner_value(x, y, inner)
    x_at, y_at, v_at = (lambda s: move(x, dx, s)), (lambda s: move(y, dy, s)), (lambda s: move(y, v, s))
    return [
        ("inner_gradient", lambda: _dot(dy, grad_y(x, y)), lambda: along(lambda s: g(y_at(s)))),
        (
            "inner_gradient_x",
            lambda: _dot(dx, problem.inner_gradient_x(x, y, inner)),
            lambda: along(lambda s: problem.inner_value(x_at(s), y, inner)),
        ),
        ("outer_gradients, x", lambda: _dot(dx, direct(0)), lambda: along(lambda s: f(x_at(s), y))),
        ("outer_gradients, y", lambda: _dot(dy, direct(1)), lambda: along(lambda s: f(x, y_at(s)))),
        ("hessian_vector", lambda: _dot(dy, hessian(v)), lambda: along(lambda s: _dot(dy, grad_y(x, v_at(s))))),
        ("hessian is symmetric", lambda: _dot(dy, hessian(v)), lambda: _dot(v, hessian(dy))),
        (
            "cross_vector",
            lambda: _dot(dx, problem.cross_vector(x, y, v, inner)),
            lambda: along(lambda s: _dot(v, grad_y(x_at(s), y))),
        ),
    ]


def _direction(key: Key[Array, ""], like: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)]
    )


def _unit(direction: PyTree) -> PyTree:
    """Of length one: a longer step crosses kinks (of ReLUs, say) that have nothing to do with the oracles."""
    length = jnp.sqrt(_dot(direction, direction))
    return jax.tree.map(lambda leaf: leaf / length, direction)


def _dot(one: PyTree, other: PyTree) -> Scalar:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return functools.reduce(jnp.add, [jnp.vdot(a, b) for a, b in pairs])


def _close(one: float, other: float, tolerance: float) -> tuple[bool, str]:
    gap = abs(one - other) / max(0.01, abs(one), abs(other))
    return gap <= tolerance, f"{one:.9g} against {other:.9g}"
