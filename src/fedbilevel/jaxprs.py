"""The names that JAX does not promise to keep: every other module takes them from here.

Traced programs and what runs them (`ClosedJaxpr`, `Jaxpr`, `JaxprEqn`, `Var`, `Literal`, `jaxpr_as_fun`), a traced
program without what its results do not need (`dce_jaxpr`), a value inside a trace (`Tracer`), which trace we are in
(`get_opaque_trace_state`), random bits without a key array (`threefry_2x32`), how events of compiling are called
(`COMPILING`), where JAX asks for what it has compiled before (`compilation_cache`, whose `_cache` is a `CacheInterface`)
and `jaxlib_version`. A test holds each to what we rely on.
"""

from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, get_opaque_trace_state, jaxpr_as_fun
from jax.extend.random import threefry_2x32
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
    "Tracer",
    "Var",
    "compilation_cache",
    "dce_jaxpr",
    "get_opaque_trace_state",
    "jaxlib_version",
    "jaxpr_as_fun",
    "threefry_2x32",
]
