"""What the losses compute, and the compiled programs of those that compute the same.

JAX knows a compiled function by the identity of the Python functions in it. A loss is the user's: what it reads (a
global, a closure's cell, an attribute, an array) may change between two calls, and a new lambda may compute what an old
one did. So every entry into the library traces the two losses once (`freeze`), and compiled code is known by what that
trace says (`run`). A few programs are kept; the others are forgotten, with what was compiled for them.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import jaxpr_as_fun
from jaxtyping import PyTree

from .canonical import Traced, canonical, digest_of, digest_of_class, trace
from .data import FederatedData
from .problem import Problem, Rows, check_losses, trace_oracle

KEPT = 16  # programs kept compiled: 5 to 15 MB each
ORACLES = {
    "inner_value": 0,
    "inner_gradient": 0,
    "inner_gradient_x": 0,
    "hessian_vector": 1,
    "cross_vector": 1,
    "outer_value": 0,
    "outer_gradients": 0,
}  # and how many vectors they take

_HELPERS = jax.make_user_context(None)  # part of what JAX knows nested functions by: loops' bodies, branches, `jit`s
_fresh = itertools.count()


@dataclasses.dataclass(frozen=True)
class Program:
    """What a problem's losses compute.

    Attributes:
        digest: of their traced programs and of every number in them; the same in every process.
        key: what compiled code is known by: the digest, the structure of x and y, and Python functions that are called
            while it runs.
        helpers: whether JAX must be told of the program when it traces nested functions, which it does once for all.
    """

    digest: str
    key: Hashable
    helpers: bool


def freeze(problem: Problem, x: PyTree, y: PyTree, data: FederatedData) -> Problem:
    """The same problem, with what its losses compute now: `run` compiles once for equal ones.

    Args:
        problem: over the floating-point arrays of x and y alone (`bind`).
        x, y: pytrees of floating-point arrays, or their shapes.

    Raises:
        InputError: a loss fails, or does not return a floating-point scalar.
    """
    if program_of(problem) is not None:
        return problem
    frozen = copy.copy(problem)
    object.__setattr__(frozen, "_program", _program(problem, x, y, data))
    return frozen


def program_of(problem: Problem) -> Program | None:
    """What a frozen problem computes; None for one that is not frozen."""
    return problem.__dict__.get("_program")


def digest(problem: Problem) -> str:
    """The digest of a frozen problem's program, the same in every process."""
    program = program_of(problem)
    assert program is not None, "freeze the problem first"
    return program.digest


def _program(problem: Problem, x: PyTree, y: PyTree, data: FederatedData) -> Program:
    drawn = lambda level, key: dataclasses.replace(level.client(0).all(), key=key)
    key = jax.random.key(0)
    rows = jax.eval_shape(drawn, data.inner, key), jax.eval_shape(drawn, data.outer, key)
    traced = _traced(problem, x, y, rows)
    found = canonical(t.jaxpr for t in traced)
    if found.helpers:  # JAX may know them with numbers of an earlier call
        with _HELPERS(next(_fresh)):
            traced = _traced(problem, x, y, rows)
            found = canonical(t.jaxpr for t in traced)
            derivatives = _derivatives(traced) if found.rules else ""
    else:
        derivatives = _derivatives(traced) if found.rules else ""
    structures = jax.tree.structure((x, y))
    objects = tuple(_Same(each) for each in found.objects)
    text = digest_of((found.digest, derivatives, problem.batched))
    return Program(text, (text, structures, objects, _own(problem)), found.helpers)


def _traced(problem: Problem, x: PyTree, y: PyTree, rows: tuple[Rows, Rows]) -> list[Traced]:
    losses = check_losses(problem, x, y, *(_without_key(level) for level in rows))
    found = [losses[name] for name in sorted(losses)]
    return found + _oracles(problem, x, y, *rows) if _own(problem) else found


def _without_key(rows: Rows) -> Rows:
    return dataclasses.replace(rows, key=None)


def _own(problem: Problem) -> type | None:
    """The class of a problem that brings oracles of its own."""
    kind = type(problem)
    names = [name for name in (*ORACLES, "row_features", "_mean") if getattr(kind, name) is not getattr(Problem, name)]
    return kind if names else None


def _oracles(problem: Problem, x: PyTree, y: PyTree, inner: Rows, outer: Rows) -> list[Traced]:
    """The programs of all oracles, on rows as exchanges draw them, with a key, and without."""
    found = []
    for name, vectors in ORACLES.items():
        rows = inner if name in ("hessian_vector", "cross_vector") or name.startswith("inner") else outer
        for drawn in (_without_key(rows), rows):
            args = (x, y, *[y] * vectors, drawn)
            with contextlib.suppress(Exception):  # whatever it raises: it will say so where it is used
                found.append(trace_oracle(problem, name, *args))
    return found


def _derivatives(traced: list[Traced]) -> str:
    """A digest of the first and second derivatives of programs that bring rules of their own."""
    return digest_of([_derivative(each) for each in traced])


def _derivative(traced: Traced) -> str:
    function = jaxpr_as_fun(traced.jaxpr)
    given = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in traced.jaxpr.in_avals]
    moving = [i for i, a in enumerate(given) if jnp.issubdtype(a.dtype, jnp.floating)]

    def value(moved, given):
        args = list(given)
        for place, leaf in zip(moving, moved, strict=True):
            args[place] = leaf
        outs = [out for out in function(*args) if jnp.issubdtype(out.dtype, jnp.floating)]
        return sum((jnp.sum(out) for out in outs[1:]), jnp.sum(outs[0]))

    def twice(moved, given, direction):
        return jax.jvp(lambda moved: jax.grad(value)(moved, given), (moved,), (direction,))

    moved = [given[i] for i in moving]
    for derivative, args in ((twice, (moved, given, moved)), (jax.grad(value), (moved, given))):
        with contextlib.suppress(Exception):  # `jax.custom_vjp` has no second one
            return canonical([jax.make_jaxpr(derivative)(*args)]).digest
    return "none"


def settle(algorithm: Any, x: PyTree) -> Any:
    """The same algorithm, whose optimizers are equal to others that compute the same.

    optax makes new functions for every transformation: they are known by their programs, too.
    """
    _note(type(algorithm))
    settled = copy.copy(algorithm)
    for field in dataclasses.fields(algorithm):
        value = getattr(algorithm, field.name)
        if isinstance(value, optax.GradientTransformation):
            with contextlib.suppress(Exception):  # it says why where it is used
                object.__setattr__(settled, field.name, _settled(value, x))
    return settled


_CLASSES: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()


def _note(kind: type) -> None:
    """Note what the functions of a user's own algorithm are, and what they read, at this call."""
    if not kind.__module__.startswith(f"{__package__}."):
        _CLASSES[kind] = digest_of_class(kind)


def class_of(algorithm: Any) -> Hashable:
    """What an algorithm's class is known by."""
    return type(algorithm), _CLASSES.get(type(algorithm))


def _settled(optimizer: Any, x: PyTree) -> Any:
    if isinstance(optimizer.update, Settled):
        return optimizer
    with jax.numpy_dtype_promotion("standard"):
        kept = trace(optimizer.init, x)
        update = trace(optimizer.update, x, jax.eval_shape(lambda: optimizer.init(x)), x)
    name = canonical([kept.jaxpr, update.jaxpr]).digest
    return optimizer._replace(init=Settled(optimizer.init, name), update=Settled(optimizer.update, name))


class Settled:
    """A function that is equal to others of the same digest."""

    def __init__(self, function: Callable, digest: str):
        self.function, self.digest = function, digest

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __hash__(self):
        return hash(self.digest)

    def __eq__(self, other):
        return isinstance(other, Settled) and self.digest == other.digest


class _Same:
    """A Python function as a key: another one is the same if its text is, and all that it has hold of."""

    def __init__(self, value: Any):
        self.value, self._parts = value, tuple(_parts(value, 0))
        self._hash = hash(tuple(map(id, self._parts)))

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        same = isinstance(other, _Same) and len(self._parts) == len(other._parts)
        return same and all(a is b for a, b in zip(self._parts, other._parts, strict=True))


def _parts(value: Any, depth: int):
    """The objects that make a function what it is."""
    code, cells = getattr(value, "__code__", None), getattr(value, "__closure__", None) or ()
    if code is None or depth > 8:
        yield value
        return
    yield code
    yield value.__globals__
    yield from value.__defaults__ or ()
    for cell in cells:
        with contextlib.suppress(ValueError):
            yield from _parts(cell.cell_contents, depth + 1)


# Compiled programs ------------------------------------------------------------------------------------------------------


def run(
    function: Callable[..., PyTree],
    problem: Problem,
    algorithm: Any,
    *args: Any,
    options: tuple[tuple[str, Any], ...] = (),
) -> PyTree:
    """`function(problem, algorithm, *args)`, compiled; what is compiled is shared between equal frozen problems.

    Args:
        function: of a module; it returns a pytree of arrays.
        algorithm: an algorithm (or None) whose numbers are arrays (`as_leaves`).
        args: pytrees; leaves that are no arrays are static, and must be hashable.
        options: of the compiler.
    """
    arrays, rest = eqx.partition(algorithm, _is_array)
    static, structure = jax.tree.flatten(rest)
    compiled = _KEPT.get(
        (compiled_as(problem), class_of(algorithm), structure, tuple(static), function),
        lambda: _Compiled(function, options),
    )
    with helpers_of(problem):
        return compiled(problem, (arrays, rest), args)


def helpers_of(problem: Problem) -> contextlib.AbstractContextManager:
    """Within it, nested functions are those of this very program: JAX traces loops' bodies once for all otherwise."""
    program = program_of(problem)
    return _HELPERS(program.digest) if program is not None and program.helpers else contextlib.nullcontext()


def compiled_as(problem: Problem) -> Hashable:
    """What compiled code of a problem is known by: its program, or the identity of its functions if it is not frozen."""
    program = program_of(problem)
    if program is not None:
        return program.key
    static, structure = jax.tree.flatten(eqx.filter(problem, eqx.is_array, inverse=True))
    return structure, tuple(static)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))


class _Compiled:
    """A function compiled for a program, for the shapes it has met."""

    def __init__(self, function: Callable, options: tuple):
        self._function, self._now = function, None
        self._jitted = jax.jit(self._traced, static_argnums=0, compiler_options=dict(options) or None)

    def __call__(self, problem: Problem, algorithm: tuple, args: tuple) -> PyTree:
        own, rest = eqx.partition(problem, eqx.is_array)  # numpy's are constants, as they are in the trace
        own, structure = jax.tree.flatten(own)
        arrays, other = eqx.partition(args, _is_array)
        static = _Static(*jax.tree.flatten(other))
        before, self._now = self._now, (rest, structure, algorithm[1])
        try:
            return self._jitted(static, own, algorithm[0], arrays)
        finally:
            self._now = before

    def _traced(self, static, own, algorithm, args):
        assert self._now is not None
        problem, structure, rest = self._now  # of this very call, not of the one that was compiled first
        problem = eqx.combine(jax.tree.unflatten(structure, own), problem)
        args = eqx.combine(args, jax.tree.unflatten(static.structure, static.leaves))
        return self._function(problem, eqx.combine(algorithm, rest), *args)


class _Static:
    """Leaves that are no arrays, as a key."""

    def __init__(self, leaves: list, structure: Any):
        self.leaves, self.structure = leaves, structure
        self._key = (structure, tuple(leaves))
        self._hash = hash(self._key)

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return isinstance(other, _Static) and self._key == other._key


class Kept:
    """The latest `most` things by key; those not asked for the longest are forgotten."""

    def __init__(self, most: int):
        self.most = most
        self._held: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is held for a key, made if need be."""
        if key not in self._held:
            made = make()
            self._held[key] = made
        self._held.move_to_end(key)
        while len(self._held) > self.most:
            self._held.popitem(last=False)
        return self._held[key]


_KEPT = Kept(KEPT)
