"""The names that JAX does not promise to keep: every other module takes them from here.

Traced programs and what runs them (`ClosedJaxpr`, `Jaxpr`, `JaxprEqn`, `Var`, `Literal`, `jaxpr_as_fun`), a traced
program without what its results do not need (`dce_jaxpr`), a value inside a trace (`Tracer`), which trace we are in
(`get_opaque_trace_state`), random bits without a key array (`threefry_2x32`), and how events of compiling are called
(`COMPILING`). A test holds each to what we rely on.
"""

from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, get_opaque_trace_state, jaxpr_as_fun
from jax.extend.random import threefry_2x32
from jax.interpreters.partial_eval import dce_jaxpr

COMPILING = "/jax/core/compile/"  # how the events of tracing, lowering and compiling begin; also what a cache gives

__all__ = [
    "COMPILING",
    "ClosedJaxpr",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Tracer",
    "Var",
    "dce_jaxpr",
    "get_opaque_trace_state",
    "jaxpr_as_fun",
    "threefry_2x32",
]
