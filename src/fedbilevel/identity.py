"""What makes a run itself: a checkpoint of another one is refused.

Counted is all that changes numbers: what the losses compute (their traced programs, with every number in them), all
leaves of x and y, the algorithm's fields, the data, the key, and the engine's settings that change numbers. Not
counted is how it is computed (`client_batch`, `mesh`, `jit`, `shuffle`), what is done about faults, metrics and names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from .algorithm import Algorithm
from .canonical import FORM, digest_of
from .compiled import run
from .data import FederatedData, Level
from .engines.base import Execution
from .given import JSON
from .oracles import around_all
from .owned import own
from .problem import Problem
from .processes import apart
from .program import Settled, digest
from .rows.spread import in_order
from .version import __version__

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_CLIENTS = 4  # whose rows the oracles are compared on
_WRITTEN_BY = f"jax {jax.__version__}, form {FORM}"  # programs traced by another version may read otherwise
_TRACED = ("losses", "structure")


class Identity:
    """What identifies a run.

    Args:
        execution: the engine bound to a frozen problem, data and key.
        x, y: (the floating-point arrays, the rest) of the start.
    """

    def __init__(
        self,
        execution: Execution,
        algorithm: Algorithm,
        x: tuple[PyTree, PyTree],
        y: tuple[PyTree, PyTree],
        data: FederatedData,
        evaluate_every: int,
    ):
        self._execution, self._data, self._algorithm = execution, data, algorithm
        self._x, self._y, self._every = x, y, evaluate_every

    @property
    def _words(self) -> dict[str, JSON]:
        """Of the fields, those that take no time."""
        algorithm, execution = self._algorithm, self._execution
        return {
            "algorithm": type(algorithm).__name__,
            **{f.name: said(getattr(algorithm, f.name)) for f in dataclasses.fields(algorithm)},
            "cohort": execution.protocol.cohort,
            "dropout": float(getattr(execution.engine, "dropout", 0.0)),
            "evaluate_every": self._every,
            "key": np.asarray(jax.random.key_data(execution.key)).tolist(),
            "precision": 64 if jax.config.jax_enable_x64 else 32,  # pyright: ignore[reportAttributeAccessIssue]
            "promotion": str(jax.config.jax_numpy_dtype_promotion),  # pyright: ignore[reportAttributeAccessIssue]
        }

    @functools.cached_property
    def fields(self) -> dict[str, JSON]:
        """By name, words or numbers: two runs are the same if these are."""
        execution, data, x, y = self._execution, self._data, self._x, self._y
        return {
            **self._words,
            "compile": execution.way,
            "start": _numbers((x[0], y[0])),
            "other leaves": _numbers((x[1], y[1])),
            "structure": _short(_ADDRESS.sub("", str(jax.tree.structure((x, y))))),
            "data": _numbers((_in_order(data.inner), _in_order(data.outer), data.weights)),
            "losses": digest(execution.problem)[:16],
        }

    @property
    def config(self) -> dict[str, JSON]:
        """What ran, for whoever reads a result later: words and numbers, and who wrote it."""
        engine = type(self._execution.engine).__name__
        told = {"engine": engine, "clients": self._data.clients, "fedbilevel": __version__, "jax": jax.__version__}
        return {**self._words, **told}

    def saved(self, state: PyTree) -> dict[str, JSON]:
        """What a checkpoint keeps: the fields, who wrote them, and the oracles' values at its x and y."""
        return {**self.fields, "written by": _WRITTEN_BY, "oracles": self._oracles(state)}

    def follow(self, saved: Mapping[str, JSON]) -> None:
        """Have the run compiled as that of a checkpoint was, where the engine leaves it open."""
        self._execution.follow(str(saved.get("compile", "full")))

    def differences(self, saved: Mapping[str, JSON]) -> str:
        """What differs from a checkpoint's fields, in words; empty if nothing does.

        Where another version wrote it, what was traced is left to `other_oracles`.
        """
        if "losses" not in saved:
            return (
                "an earlier version of fedbilevel wrote it, which did not note what the losses compute "
                "(that version can go on with it)"
            )
        saved = {"compile": "full", **self._later, **saved}  # earlier versions knew nothing else
        both = {**self.fields, "written by": _WRITTEN_BY, "oracles": None}
        left_out = {"written by", "oracles"}
        if saved.get("written by") != _WRITTEN_BY:
            traced = (name for name, value in self.fields.items() if str(value).startswith(_OPTAX))
            left_out |= {*_TRACED, *traced}
        return differences(*({k: v for k, v in each.items() if k not in left_out} for each in (saved, both)))

    @property
    def _later(self) -> dict[str, JSON]:
        """Options that are off by default, as they were before there were any: off."""
        return {f.name: said(None) for f in dataclasses.fields(self._algorithm) if f.default is None}

    def other_oracles(self, saved: Mapping[str, JSON], state: PyTree) -> str:
        """Whether the losses compute something else at a checkpoint's x and y, where another version wrote it."""
        if saved.get("written by") == _WRITTEN_BY:
            return ""
        now, then = (np.asarray(values, float) for values in (self._oracles(state), saved.get("oracles", [])))
        tolerance = 1e-3 if self.fields["precision"] == 32 else 1e-7
        if now.shape == then.shape and np.allclose(now, then, rtol=tolerance, atol=1e-12, equal_nan=True):
            return ""
        return "the losses' values or derivatives at its x and y are others"

    def _oracles(self, state: PyTree) -> list[float]:
        found = run(_measured, self._execution.problem, None, state.x, state.y, self._data)
        optimizers = [getattr(self._algorithm, f.name) for f in dataclasses.fields(self._algorithm)]
        steps = [_step(each, state.x) for each in optimizers if isinstance(each, optax.GradientTransformation)]
        return [*np.asarray(found, float).tolist(), *steps]


def differences(saved: Mapping[str, JSON], now: Mapping[str, JSON]) -> str:
    """What differs between two runs' fields, in words; empty if nothing does."""
    names = sorted(set(saved) | set(now))
    other = [f"{n} was {saved.get(n)!r} and is {now.get(n)!r}" for n in names if saved.get(n) != now.get(n)]
    return "; ".join(other[:3]) + (f"; and {len(other) - 3} more" if len(other) > 3 else "")


_OPTAX = "optax "


def said(value: Any) -> str:
    """A field of an algorithm in words, the same in every process."""
    if isinstance(value, optax.GradientTransformation) and isinstance(value.update, Settled):
        return _OPTAX + value.update.digest[:16]
    if isinstance(value, (np.generic, jax.Array)) and np.ndim(value) == 0:
        return repr(value.item())
    words = repr(value)
    plain = not isinstance(value, (jax.Array, np.ndarray)) and not callable(value) and not _ADDRESS.search(words)
    return words if plain else _short(value)


def _in_order(level: Level) -> Level:
    """The same for any number of processes: where several hold the rows, they are read in the clients' order."""
    if not any(map(apart, jax.tree.leaves(level.rows))):
        return level
    counts, offsets = np.asarray(level.counts), np.asarray(level.offsets)
    rows = jax.tree.map(lambda leaf: in_order(leaf, offsets, counts), level.rows)
    ends = np.cumsum(counts)
    return eqx.tree_at(lambda kept: (kept.rows, kept.offsets), level, (rows, (ends - counts).astype(np.int32)))


def _numbers(tree: PyTree) -> str:
    """A digest of all leaves, by their places: values, shapes and types."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return _short([(jax.tree_util.keystr(path), leaf) for path, leaf in leaves])


def _short(value: PyTree) -> str:
    return digest_of(value)[:16]


# By values --------------------------------------------------------------------------------------------------------------


def _measured(problem: Problem, _: None, x: PyTree, y: PyTree, data: FederatedData) -> Float[Array, " numbers"]:
    """Values, sizes of gradients, and products along two fixed directions, as means over a few clients: (9,), or (6,)."""
    direction = lambda tree, phase: jax.tree.map(
        lambda leaf: (
            jnp.cos(jnp.arange(leaf.size, dtype=jnp.result_type(float)) + phase).reshape(leaf.shape).astype(leaf.dtype)
        ),
        tree,
    )
    u, v = direction(y, 0.0), direction(y, 1.0)
    problem = around_all(problem, data, x, y)

    everybodys = x, y, u, v

    def of(i: Int[Array, ""]) -> Float[Array, " numbers"]:
        x, y, u, v = own(everybodys, i)
        inner, outer = data.inner.client(i).all(), data.outer.client(i).all()
        found = [
            problem.inner_value(x, y, inner),
            problem.outer_value(x, y, outer),
            *(_size(part) for part in problem.outer_gradients(x, y, outer)),
            _size(problem.inner_gradient(x, y, inner)),
            _size(problem.inner_gradient_x(x, y, inner)),
        ]
        with contextlib.suppress(Exception):  # a problem may have no second derivatives to give
            product = problem.hessian_vector(x, y, u, inner)
            found += [_size(product), _along(product, v), _size(problem.cross_vector(x, y, u, inner))]
        return jnp.stack([jnp.asarray(number, jnp.result_type(float)) for number in found])

    few = min(_CLIENTS, data.clients)
    return jnp.mean(jax.lax.map(of, jnp.arange(few, dtype=jnp.int32) * (data.clients // few)), axis=0)


def _size(tree: PyTree) -> Float[Array, ""]:
    return jnp.sqrt(_along(tree, tree))


def _along(one: PyTree, other: PyTree) -> Float[Array, ""]:
    real = jnp.result_type(float)
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return jnp.sum(jnp.stack([jnp.sum(a.astype(real) * b.astype(real)) for a, b in pairs]))


def _step(optimizer: optax.GradientTransformation, x: PyTree) -> float:
    """The size of an optimizer's second step along ones."""
    with jax.numpy_dtype_promotion("standard"):
        ones, state = jax.tree.map(jnp.ones_like, x), optimizer.init(x)
        for _ in range(2):
            updates, state = optimizer.update(ones, state, x)
        return float(optax.tree.norm(updates))
