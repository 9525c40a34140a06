"""What is taken for x and y: pytrees whose floating-point arrays are optimised, and whose other leaves stay as they are."""

from __future__ import annotations

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .errors import InputError, check
from .foreign import Came, library_of
from .jaxprs import Tracer
from .problem import describe, is_complex, strong
from .rows.narrow import WIDER, held
from .rows.values import shown

_RENEWED = {"BatchStat", "Cache", "Intermediate", "Perturbation", "RngState"}  # of flax.nnx's variables


def trainable(variable: PyTree, name: str) -> tuple[PyTree, PyTree]:
    """Split x or y into its floating-point arrays and the rest; Python and numpy numbers become arrays.

    Arrays of a library that is known (`foreign`) become JAX's; the rest has a mark there, so that results may be given
    back as they came (`as_given`). Python's floats in an equinox module (the rate of a dropout) and running statistics
    of a flax.nnx module are of the rest, as they are to these libraries.

    Raises:
        InputError: no leaf is a floating-point array, or one is complex, masked, no array of numbers, not finite, or
            does not survive in the 32 bits that JAX holds without `jax_enable_x64`; or it is all that a flax.linen module
            has, with running statistics.
    """
    check(
        not (isinstance(variable, Mapping) and {"params", "batch_stats"} <= set(variable)),
        f"{name} has running statistics beside the parameters of a flax.linen module, and is optimised: pass "
        f"variables['params'], and put them back in the loss, module.apply({{**variables, 'params': {name}}}, ...).",
    )
    named = [
        (f"{name}{jax.tree_util.keystr(path)}", leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(variable)[0]
    ]
    marks = [None if (library := library_of(leaf)) is None else Came(library) for _, leaf in named]
    if any(marks):
        own = zip(named, marks, strict=True)
        named = [(w, leaf if mark is None else mark.library.variable(leaf, w)) for (w, leaf), mark in own]
    for where, leaf in named:
        _check_real(leaf, where)
    settings, structure = _settings(variable), jax.tree.structure(variable)
    kept = zip(named, jax.tree.leaves(settings), strict=True)
    leaves = [leaf if stays else _as_array(leaf, where) for (where, leaf), stays in kept]
    variable = strong(jax.tree.unflatten(structure, leaves))
    check(
        not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(variable)),
        f"{name} is a tracer: solve, estimate_hypergradient, protocol and reference.* compile what they run and cannot "
        "be called within jax.jit, jax.grad or jax.vmap; call them outside.",
    )
    moves = lambda leaf, stays: eqx.is_inexact_array(leaf) and not stays
    arrays, rest = eqx.partition(variable, jax.tree.map(moves, variable, settings))
    check(
        jax.tree.leaves(arrays),
        lambda: f"{name} holds no floating-point array to optimise: pass float arrays (got {describe(variable)}).",
    )
    for path, leaf in jax.tree_util.tree_flatten_with_path(arrays)[0]:
        check(
            bool(np.isfinite(np.asarray(leaf)).all()),
            f"the start point {name}{jax.tree_util.keystr(path)} holds NaN or infinite values: start from finite numbers.",
        )
    if any(marks):
        rest = eqx.combine(jax.tree.unflatten(jax.tree.structure(variable), marks), rest)
    return arrays, rest


def _settings(variable: PyTree) -> PyTree:
    """A tree of booleans: whether a leaf is a setting, or a statistic, of a module."""
    renewed = lambda node: any(
        kind.__name__ in _RENEWED and kind.__module__.startswith("flax.nnx") for kind in type(node).__mro__
    )
    module = lambda node: isinstance(node, eqx.Module)

    def spread(node: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: renewed(node) or (module(node) and isinstance(leaf, float)), node)

    return jax.tree.map(spread, variable, is_leaf=lambda node: renewed(node) or module(node))


def _check_real(leaf: PyTree, where: str) -> None:
    """Refuse complex leaves: steps along -`jax.grad`, the conjugate, do not go downhill."""
    if is_complex(leaf):
        kind = f"{getattr(leaf, 'dtype', 'number')}{list(np.shape(leaf)) or ''}"
        raise InputError(
            f"{where} is complex ({kind}), and only real variables are optimised: pass its real and imaginary parts as two "
            f"real arrays, and put them together in the loss with jax.lax.complex (the rows themselves may be complex)."
        )


def _as_array(leaf: PyTree, where: str) -> PyTree:
    """A leaf as JAX holds it; what is no array or float stays as it is."""
    if isinstance(leaf, float):
        leaf = np.float64(leaf)
    if not isinstance(leaf, np.ndarray | np.generic):
        return jnp.asarray(leaf) if eqx.is_array_like(leaf) and hasattr(leaf, "dtype") else leaf
    masked = isinstance(leaf, np.ma.MaskedArray)
    check(not masked, f"{where} is a masked array, whose hidden values would count: pass {where}.filled(...).")
    known = leaf.dtype.kind in "biuf" or jnp.issubdtype(leaf.dtype, jnp.floating)
    check(known, f"{where} is an array of {leaf.dtype}, which is no number: leave it out.")
    target = held(leaf.dtype.newbyteorder("="))
    with np.errstate(over="ignore", invalid="ignore"):
        cast = np.asarray(leaf).astype(target)
    if target != leaf.dtype and leaf.dtype.kind in "iuf":
        lost = np.isfinite(leaf) & ~np.isfinite(cast) if leaf.dtype.kind == "f" else cast != leaf
        if lost.any():
            value = shown(np.asarray(leaf)[lost].flat[0])
            raise InputError(f"{where} holds {value}, which does not fit into {target}: rescale it, or {WIDER}.")
    return jnp.asarray(cast, target)
