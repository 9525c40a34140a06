"""The names that JAX does not promise to keep: every other module takes them from here.

Traced programs and what runs them (`ClosedJaxpr`, `Jaxpr`, `JaxprEqn`, `Var`, `Literal`, `jaxpr_as_fun`), a traced
program without what its results do not need (`dce_jaxpr`), a value inside a trace (`Tracer`), what a trace knows of a
value (`ShapedArray`), which trace we are in (`get_opaque_trace_state`), random bits without a key array
(`threefry_2x32`), how events of compiling are called (`COMPILING`), a call of Python by a compiled program (`on_host`),
a number that gives way as Python's do (`weakly`),
where JAX asks for what it has compiled before (`compilation_cache`, whose `_cache` is a `CacheInterface`) and
`jaxlib_version`. A test holds each to what we rely on.
"""

from collections.abc import Callable, Sequence
from typing import cast

import jax
import numpy as np
from jax._src import compilation_cache
from jax._src.callback import emit_python_callback
from jax._src.compilation_cache_interface import CacheInterface
from jax._src.lax.lax import _convert_element_type
from jax.core import ShapedArray, Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, Var, get_opaque_trace_state, jaxpr_as_fun
from jax.extend.random import threefry_2x32
from jax.interpreters import mlir
from jax.interpreters.partial_eval import dce_jaxpr
from jaxlib.version import __version__ as jaxlib_version

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
    "compilation_cache",
    "dce_jaxpr",
    "get_opaque_trace_state",
    "jaxlib_version",
    "jaxpr_as_fun",
    "on_host",
    "threefry_2x32",
    "weakly",
]


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
