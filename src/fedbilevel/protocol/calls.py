"""The calls that a server program may make of `fed`, and what a client answers."""

from __future__ import annotations

from collections.abc import Collection

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from ..component import method_named, path_of, title_of
from ..errors import InputError, check
from ..federation import Client, Cohort, Index, Method
from ..oracles import traced_once
from ..problem import Problem, describe
from .sites import Path, Site


def answer(problem: Problem, algorithm: eqx.Module, name: str, parts: tuple, message: tuple) -> PyTree:
    """What a client replies to a message, for `compiled.traced`.

    Args:
        parts: what a `Client` is made of beside its problem.

    Raises:
        InputError: something else than arrays.
    """
    out = named_method(algorithm, name)(Client(traced_once(problem), *parts), *message)
    leaves = jax.tree.leaves(out)
    good = all(isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex) for leaf in leaves)
    where = f"{title_of(algorithm)}.{name}"
    check(good, lambda: f"{where} must return a pytree of arrays; it returned {describe(out)}.")
    return out


def named_method(algorithm: eqx.Module, name: str) -> Method:
    """The client method of that name, of the algorithm or (with a path before it) of a module in it."""
    return method_named(algorithm, name)


def client_method(algorithm: eqx.Module, method: Method) -> tuple[str, Method]:
    """A client method's name, and that method of the algorithm as configured (what a client's own copy would run).

    A method of a module in the algorithm is named by its path, as in "lower.gradient".
    """
    name, owner = getattr(method, "__name__", None), getattr(method, "__self__", None)
    path = path_of(owner, algorithm)
    known = isinstance(name, str) and path is not None and callable(_found(algorithm, f"{path}{name}"))
    check(
        known,
        lambda: (
            f"fed.average takes a method of {title_of(algorithm)}, as in fed.average(self.anchor, x, y); "
            f"got {method!r}."
        ),
    )
    check(not str(name).startswith("_"), f"{name!r} is private: clients run public methods only. Drop the underscore.")
    return f"{path}{name}", named_method(algorithm, f"{path}{name}")


def _found(algorithm: eqx.Module, name: str) -> Method | None:
    try:
        return named_method(algorithm, name)
    except AttributeError:
        return None


def check_times(times: Index, most: int | None) -> int | Int[Array, ""]:
    """How often a loop runs: never more than `most`; refuses a loop whose number of rounds nothing bounds."""
    if isinstance(times, (int, np.integer)):
        check(times >= 0, f"fed.repeat(times=...) cannot be negative; got {times}.")
        return int(times) if most is None else min(int(times), most)
    if most is None:
        raise InputError("fed.repeat with a drawn number of rounds needs most=, the largest it can be.")
    return jnp.minimum(jnp.asarray(times, jnp.int32), most)


def check_beside(beside: bool, path: Path, sites: dict[Path, Site], single: Collection[Path] = ()) -> None:
    """Refuse an exchange in the round of another where there is none before it (in the same loop).

    Args:
        single: loops of one turn at most: what is in them may be beside what was before them.
    """
    check(isinstance(beside, bool), f"fed.average(beside=...) is True or False; got {beside!r}.")
    before = max((other for other in sites if other < path), default=())
    shared = before != () and _home(before, single) == _home(path, single)
    check(shared or not beside, "fed.average(beside=True) needs an exchange before it, in the same loop.")


def _home(path: Path, single: Collection[Path]) -> Path:
    """The loop that an exchange is in, but for those of one turn at most."""
    within = path[:-1]
    while within in single:
        within = within[:-1]
    return within


def check_given(cohort: Cohort, clients: int) -> Cohort:
    """A cohort given by the server program, as an array."""
    if cohort is None:
        return None
    cohort = cohort if getattr(cohort, "dtype", None) == jnp.int32 else jnp.asarray(cohort, jnp.int32)
    good = cohort.ndim == 1 and 1 <= cohort.shape[0] <= clients
    check(
        good,
        f"fed.average(cohort=...) takes the indices of 1 to {clients} clients, as from fed.draw_cohort(); "
        f"got an array of shape {cohort.shape}.",
    )
    return cohort


def check_carry(before: PyTree, after: PyTree) -> None:
    """Refuse a loop body that changes the carry's structure, shapes or dtypes."""
    if not alike(before, after):
        raise InputError(
            f"the body of a loop must return a carry like the one it was given, {describe(before)}; "
            f"it returned {describe(after)}."
        )


def alike(one: PyTree, other: PyTree) -> bool:
    """Whether two pytrees of arrays, or of their shapes, have one structure, shapes and dtypes."""
    (leaves, structure), (others, theirs) = jax.tree.flatten(one), jax.tree.flatten(other)
    signature = lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf))
    return structure == theirs and all(signature(a) == signature(b) for a, b in zip(leaves, others, strict=True))
