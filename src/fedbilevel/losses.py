"""The losses of a problem, traced: what they return is looked at before anything is compiled."""

from __future__ import annotations

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from . import norms
from .canonical import Traced, trace
from .errors import InputError, check
from .owned import bare, own
from .problem import Problem, Rows, describe, is_complex


def check_losses(problem: Problem, x: PyTree, y: PyTree, inner: Rows, outer: Rows) -> dict[str, Traced]:
    """Refuse losses that do not return a floating-point scalar, before anything is compiled.

    Returns:
        The programs of the losses (and features), traced once, of (the problem's arrays, x, y, data).

    Raises:
        InputError: with the level and what its loss returned, or how it failed.
    """
    found: dict[str, Traced] = {}
    alone = own(x, 0), own(y, 0)  # as one client has them
    x, y = map(bare, alone)
    for level, rows in (("inner", inner), ("outer", outer)):
        if level == "outer" and problem.outer_means is not None:
            found |= _of_means(problem, x, y, rows)
            continue
        theirs = getattr(type(problem), f"{level}_value") is not getattr(Problem, f"{level}_value")
        if theirs:  # the problem brings its own oracles: judge what those return
            traced = _trace(problem, f"{level}_value", alone, (rows,), f"{level} loss")
        else:
            first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), rows.examples)
            data = (rows.examples, rows.weights) if problem.batched else (first,)
            if level == "inner" and problem.features is not None:
                found["features"] = _features(problem, x, data[:1])
                data = (*data, found["features"].out)
            _check_taken(problem, level, data)
            if level == "inner" and problem.random:
                found["random"], traced = _with_and_without_key(problem, (x, y), data, rows)
            else:
                traced = _trace(problem, level, (x, y), data, f"{level} loss")
        found[level] = traced
        _check_scalar(problem, level, traced.out)
    return found


def _check_scalar(problem: Problem, level: str, out: PyTree) -> None:
    takes = "a batch" if problem.batched else "one example"
    check(
        not is_complex(out),
        f"the {level} loss must be real; for {takes} it returned {getattr(out, 'dtype', out)}: take "
        f"jnp.abs(...) ** 2, or jnp.real(...) of it.",
    )
    check(
        isinstance(out, jax.ShapeDtypeStruct) and out.shape == () and jnp.issubdtype(out.dtype, jnp.floating),
        lambda: f"the {level} loss must return a floating-point scalar for {takes}; it returned {describe(out)}.",
    )


def _check_taken(problem: Problem, level: str, data: tuple) -> None:
    """Refuse a key that nobody declared, or nobody takes."""
    try:
        loss = getattr(problem, level)
        signature = inspect.signature(getattr(loss, "loss", loss))  # the user's own, where it is completed by a rest
    except ValueError:  # a function without one
        return

    def takes(more: int) -> bool:
        try:
            signature.bind(*[None] * (2 + len(data) + more))
        except TypeError:
            return False
        return True

    keyed = level == "inner" and problem.random
    if takes(int(keyed)):
        return
    rows = "examples, weights" if problem.batched else "example"
    called = ", ".join(["x, y", rows, *["features"] * (level == "inner" and problem.features is not None)])
    if keyed:
        check(
            not takes(0),
            f"Problem(random=True) calls the inner loss as inner({called}, {'keys' if problem.batched else 'key'}), and it "
            "takes no key: give it one argument more.",
        )
        return
    then = {
        "inner": "if that is a random key, declare it, Problem(..., random=True).",
        "outer": "no key goes to the outer loss, which judges what was trained without dropout.",
    }
    check(not takes(1), f"the {level} loss is called as {level}({called}) and takes one argument more: {then[level]}")


def _with_and_without_key(problem: Problem, variables: tuple, data: tuple, rows: Rows) -> tuple[Traced, Traced]:
    """The two programs of a random inner loss."""
    one = lambda: jax.random.key(0)
    keys = jax.eval_shape(lambda: jax.random.split(one(), rows.weights.shape) if problem.batched else one())
    drawn = _trace(problem, "inner", variables, (*data, keys), "inner loss, given a key,")
    _check_scalar(problem, "inner", drawn.out)
    try:
        return drawn, _trace(problem, "inner", variables, (*data, None), "inner loss, given key=None,")
    except InputError as error:
        raise InputError(
            f"{error}. It is judged without randomness, and has to run without a key: no dropout there, as in "
            "`dropout(h, key=key, inference=key is None)`."
        ) from error.__cause__


def _of_means(problem: Problem, x: PyTree, y: PyTree, rows: Rows) -> dict[str, Traced]:
    """The programs of an outer loss of means: of what a row adds, and of F."""
    first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), rows.examples)
    data = (rows.examples, rows.weights) if problem.batched else (first,)
    takes = "a batch" if problem.batched else "one example"
    each = _trace(problem, "outer_means", (x, y), data, "function outer_means")
    leaves = jax.tree.leaves(each.out)
    numbers = all(
        isinstance(leaf, (jax.ShapeDtypeStruct, bool, int, float)) and not is_complex(leaf) for leaf in leaves
    )
    check(
        leaves and numbers,
        lambda: (
            f"outer_means must return a pytree of real numbers or arrays for {takes}; it returned {describe(each.out)}."
        ),
    )
    floating = all(jnp.issubdtype(getattr(leaf, "dtype", int), jnp.floating) for leaf in leaves)
    check(
        not problem.batched or floating,
        lambda: (
            f"with batched=True outer_means must return floating-point means over the rows, by their weights; it returned "
            f"{describe(each.out)}."
        ),
    )
    means = jax.eval_shape(problem.means, x, y, rows)
    of = _trace(problem, "outer_of", (means,), (), "function outer_of of the means")
    check(
        isinstance(of.out, jax.ShapeDtypeStruct) and of.out.shape == () and jnp.issubdtype(of.out.dtype, jnp.floating),
        lambda: f"outer_of must return a floating-point scalar for the means; it returned {describe(of.out)}.",
    )
    return {"outer_means": each, "outer_of": of}


def _features(problem: Problem, x: PyTree, data: tuple) -> Traced:
    traced = _trace(problem, "features", (x,), data, "features function")
    phi = traced.out
    leaves, shape = jax.tree.leaves(phi), jax.tree.leaves(data)[0].shape
    good = leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    check(good, lambda: f"the features function must return a pytree of arrays; it returned {describe(phi)}.")
    rows_first = all(leaf.shape[:1] == shape[:1] for leaf in leaves)
    check(
        not problem.batched or rows_first,
        lambda: (
            f"with batched=True the features function must return arrays with rows first, as many as in "
            f"{describe(data[0])}; it returned {describe(phi)}."
        ),
    )
    return traced


def _trace(problem: Problem, name: str, variables: tuple, data: tuple, what: str) -> Traced:
    try:
        with norms.refused():
            return trace_oracle(problem, name, *variables, *data)
    except InputError:
        raise
    except Exception as error:  # whatever the user's function raises, on whatever shapes
        given = data[0] if data else variables[0]
        raise InputError(f"the {what} failed on {describe(given)}: {norms.explained(error)}") from error


def trace_oracle(problem: Problem, name: str, *args: PyTree) -> Traced:
    """The program of an oracle or loss, by its name, over the problem's own arrays and `args`."""
    arrays, rest = eqx.partition(problem, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)

    whole = lambda leaves: eqx.combine(jax.tree.unflatten(structure, leaves), rest)
    oracle = lambda leaves, *args: getattr(whole(leaves), name)(*args)

    return trace(oracle, leaves, *args)
