"""The names that JAX does not promise to keep: every other module takes them from here.

Traced programs and what runs them (`ClosedJaxpr`, `Jaxpr`, `JaxprEqn`, `Var`, `Literal`, `jaxpr_as_fun`), a traced
program without what its results do not need (`dce_jaxpr`), a value inside a trace (`Tracer`), what a trace knows of a
value (`ShapedArray`), which trace we are in (`get_opaque_trace_state`), random bits without a key array
(`threefry_2x32`), how events of compiling are called (`COMPILING`), calls of Python by a compiled program (`on_host`, and
`each_on_host` under vmap), an equation done again (`bound`), whether arrays belong to a trace that has ended (`usable`),
a number that gives way as Python's do (`weakly`), where JAX asks for what it has compiled before (`compilation_cache`,
whose `_cache` is a `CacheInterface`) and `jaxlib_version`. A test holds each to what we rely on.
"""

from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import compilation_cache
from jax._src.callback import emit_python_callback
from jax._src.compilation_cache_interface import CacheInterface
from jax._src.core import trace_ctx
from jax._src.lax.lax import _convert_element_type
from jax.core import ShapedArray, Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, Var, get_opaque_trace_state, jaxpr_as_fun
from jax.extend.random import threefry_2x32
from jax.interpreters import batching, mlir
from jax.interpreters.partial_eval import dce_jaxpr
from jax.typing import ArrayLike
from jaxlib.version import __version__ as jaxlib_version
from jaxtyping import PyTree

COMPILING = "/jax/core/compile/"  # how the events of tracing, lowering and compiling begin; also what a cache gives

__all__ = [
    "COMPILING",
    "CacheInterface",
    "ClosedJaxpr",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "ShapedArray",
    "Tracer",
    "Var",
    "bound",
    "compilation_cache",
    "dce_jaxpr",
    "each_on_host",
    "get_opaque_trace_state",
    "jaxlib_version",
    "jaxpr_as_fun",
    "on_host",
    "threefry_2x32",
    "usable",
    "weakly",
]


def usable(tree: PyTree) -> bool:
    """Whether the arrays of a pytree can be used here: those of a loop's body, say, cannot after it."""
    open_ones, trace = [], trace_ctx.trace
    while trace is not None:
        open_ones.append(trace)
        trace = getattr(trace, "parent_trace", None)
    tracers = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, Tracer)]
    return all(any(leaf._trace is each for each in open_ones) for leaf in tracers)


def bound(whole: Jaxpr, eqn: JaxprEqn, given: Sequence[ArrayLike]) -> list[jax.Array]:
    """What one equation of a traced program makes of other values than it was traced with."""
    variables = {of: value for of, value in zip(eqn.invars, given, strict=True) if not isinstance(of, Literal)}
    alone = whole.replace(constvars=[], invars=list(variables), outvars=eqn.outvars, eqns=[eqn])
    return list(jaxpr_as_fun(ClosedJaxpr(alone, []))(*variables.values()))


def weakly(number: jax.Array) -> jax.Array:
    """A number whose type gives way in arithmetic, as that of Python's numbers does, within traces too."""
    return cast(jax.Array, _convert_element_type(number, number.dtype, weak_type=True))


_on_host = Primitive("on_host")
_on_host.multiple_results = True


def on_host(
    function: Callable[..., Sequence[np.ndarray]], like: Sequence[jax.ShapeDtypeStruct | jax.Array], *args: jax.Array
) -> list[jax.Array]:
    """`function(*args)` in Python, whenever a compiled program comes by; not under vmap or grad.

    It is given numpy's arrays and returns some. (`io_callback` hands it JAX's, to be copied by threads that may all
    wait for it.) Only what its results are used for puts calls in order: hand one on to the next.

    Args:
        function: of a module.
        like: shapes and dtypes of what it returns.
    """
    shapes = tuple((tuple(one.shape), np.dtype(one.dtype)) for one in like)
    return _on_host.bind(*args, function=function, shapes=shapes)


@_on_host.def_abstract_eval
def _shapes_on_host(*_, function, shapes):
    return [ShapedArray(shape, dtype) for shape, dtype in shapes]


def _lowered_on_host(context, *args, function, shapes):
    results, _, _ = emit_python_callback(
        context, lambda *given: tuple(function(*given)), None, list(args), context.avals_in, context.avals_out,
        has_side_effect=True, returns_token=False,
    )  # fmt: skip
    return results


mlir.register_lowering(_on_host, _lowered_on_host, cacheable=False)


_each_on_host = Primitive("each_on_host")
_each_on_host.multiple_results = True


def each_on_host(
    function: Callable[..., Sequence[np.ndarray]], like: Sequence[jax.ShapeDtypeStruct | jax.Array], *args: jax.Array
) -> list[jax.Array]:
    """`function((), *args)` in Python; under vmap `function((n, ...), *args)`, once for all: no derivative.

    It is given numpy's arrays, which it must not change, with a leading axis for each vmap: of n, or of 1 where all share
    them; and returns arrays with all of those axes. A call whose results nobody uses is left out. Within it nothing may
    be asked of JAX, which may wait for it.

    Args:
        function: hashable; it is a parameter of the traced program.
        like: shapes and dtypes of what it returns for one.
    """
    shapes = tuple((tuple(one.shape), np.dtype(one.dtype)) for one in like)
    found = _each_on_host.bind(*args, function=function, shapes=shapes, batch=())
    return [_of_words(words, dtype) for words, (_, dtype) in zip(found, shapes, strict=True)]


def _words(dtype: np.dtype) -> tuple[tuple[int, ...], np.dtype]:
    """(Axes, type) of what a number travels as: one of 64 bits as two words.

    JAX looks at what Python returns in a thread of XLA's, where `with jax.enable_x64():` does not hold, and halves it.
    """
    return ((2,), np.dtype(np.uint32)) if dtype.itemsize == 8 else ((), dtype)


def _of_words(words: jax.Array, dtype: np.dtype) -> jax.Array:
    return words if words.dtype == dtype else jax.lax.bitcast_convert_type(words, dtype)


def _as_words(found: Sequence[np.ndarray], shapes: tuple) -> tuple[np.ndarray, ...]:
    given = [np.ascontiguousarray(one, dtype).reshape(one.shape) for one, (_, dtype) in zip(found, shapes, strict=True)]
    axes = [_words(one.dtype) for one in given]
    return tuple(one[..., None].view(kind) if extra else one for one, (extra, kind) in zip(given, axes, strict=True))


@_each_on_host.def_abstract_eval
def _shapes_of_each(*_, function, shapes, batch):
    parts = [(shape, *_words(dtype)) for shape, dtype in shapes]
    return [ShapedArray((*batch, *shape, *extra), kind) for shape, extra, kind in parts]


@_each_on_host.def_impl
def _each_now(*args, function, shapes, batch):
    return [jnp.asarray(one) for one in _as_words(function(batch, *map(np.asarray, args)), shapes)]


def _each_of_many(args, dims, *, function, shapes, batch):
    size = next(arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None)
    wide = [
        jnp.expand_dims(arg, 0) if dim is None else jnp.moveaxis(arg, dim, 0)
        for arg, dim in zip(args, dims, strict=True)
    ]
    out = _each_on_host.bind(*wide, function=function, shapes=shapes, batch=(size, *batch))
    return out, [0] * len(out)


batching.primitive_batchers[_each_on_host] = _each_of_many


def _each_lowered(context, *args, function, shapes, batch):
    call = lambda *given: _as_words(function(batch, *given), shapes)
    results, _, _ = emit_python_callback(
        context, call, None, list(args), context.avals_in, context.avals_out, has_side_effect=False, returns_token=False
    )
    return results


mlir.register_lowering(_each_on_host, _each_lowered, cacheable=False)
