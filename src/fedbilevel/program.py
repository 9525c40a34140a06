"""What the losses compute, at the call.

JAX knows a compiled function by the identity of the Python functions in it. A loss is the user's: what it reads (a
global, a closure's cell, an attribute, an array) may change between two calls, and a new lambda may compute what an old
one did. So every entry into the library traces the two losses once (`freeze`), and compiled code is known by what that
trace says (`compiled.run`).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from .arrays import Structure
from .canonical import Traced, canonical, digest_of, digest_of_class, trace
from .convolutions import ByProducts, convolves
from .data import FederatedData, Level
from .jaxprs import jaxpr_as_fun
from .losses import check_losses, trace_oracle
from .problem import ORACLES, Problem, Rows, own_oracles

_HELPERS = jax.make_user_context(None)  # part of what JAX knows nested functions by: loops' bodies, branches, `jit`s
_fresh = itertools.count()

Module = TypeVar("Module", bound=eqx.Module)


@dataclasses.dataclass(frozen=True)
class Program:
    """What a problem's losses compute.

    Attributes:
        digest: of their traced programs and of every number in them; the same in every process.
        key: what compiled code is known by: the digest, the structure of x and y, and Python functions that are called
            while it runs.
        helpers: whether JAX must be told of the program when it traces nested functions, which it does once for all.
        holds: whether the losses hold arrays. Parts of programs that are traced once would hold on to them, and to
            what numpy's were when they were first used.
        convolves: whether the losses have convolutions that are sooner done as products.
    """

    digest: str
    key: Hashable
    helpers: bool
    holds: bool = False
    convolves: bool = False


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
    problem = problem.settled(x, y, data)
    return known_as(problem, _program(problem, x, y, data))


def known_as(problem: Problem, program: Program | None) -> Problem:
    """The same problem, of which it is known what it computes; as it is if that is None."""
    if program is None:
        return problem
    frozen = copy.copy(problem)
    object.__setattr__(frozen, "_program", program)
    for name in ("inner", "outer", "features", "outer_means") if program.convolves else ():
        loss = getattr(problem, name)
        if loss is not None and not isinstance(loss, ByProducts):
            object.__setattr__(frozen, name, ByProducts(loss))
    return frozen


def program_of(problem: Problem) -> Program | None:
    """What a frozen problem computes; None for one that is not frozen."""
    return problem.__dict__.get("_program")


def compiled_as(problem: Problem) -> Hashable:
    """What compiled code of a problem is known by: its program, or the identity of its functions if it is not frozen."""
    program = program_of(problem)
    if program is not None:
        return program.key
    static, structure = jax.tree.flatten(eqx.filter(problem, eqx.is_array, inverse=True))
    return structure, tuple(static)


def helpers_of(problem: Problem) -> contextlib.AbstractContextManager:
    """Within it, nested functions are those of this very program: JAX traces loops' bodies once for all otherwise."""
    program = program_of(problem)
    return _HELPERS(program.digest) if program is not None and program.helpers else contextlib.nullcontext()


def digest(problem: Problem) -> str:
    """The digest of a frozen problem's program, the same in every process."""
    program = program_of(problem)
    assert program is not None, "freeze the problem first"
    return program.digest


def _program(problem: Problem, x: PyTree, y: PyTree, data: FederatedData) -> Program:
    rows = _drawn(data.inner), _drawn(data.outer)
    traced = _traced(problem, x, y, *rows)
    found = canonical(t.jaxpr for t in traced)
    if found.helpers:  # JAX may know them with numbers of an earlier call
        with _HELPERS(next(_fresh)):
            traced = _traced(problem, x, y, *rows)
            found = canonical(t.jaxpr for t in traced)
            derivatives = _derivatives(traced) if found.rules else ""
    else:
        derivatives = _derivatives(traced) if found.rules else ""
    structures = jax.tree.structure((x, y))
    objects = tuple(_Same(each) for each in found.objects)
    text = digest_of((found.digest, derivatives, problem.batched))
    convolved = jax.default_backend() == "cpu" and any(convolves(t.jaxpr.jaxpr) for t in traced)
    return Program(text, (text, structures, objects, _own(problem)), found.helpers, found.holds, convolved)


class _Drawn(NamedTuple):
    """The shapes of a client's rows at a level: as an exchange draws them, with a key, and without."""

    without: Rows
    keyed: Rows


def _drawn(level: Level) -> _Drawn:
    leaves, structure = jax.tree.flatten((level, jax.random.key(0)))
    known = tuple((leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in leaves)
    return _shapes(structure, known, jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]


@functools.lru_cache(64)
def _shapes(structure: Structure, known: tuple, wide: bool) -> _Drawn:
    """`_drawn`, by the structure and the shapes of a level and a key; `wide` is JAX's setting, under which they count."""

    def both(level: Level, key: Key[Array, ""]) -> _Drawn:
        rows = level.client(0).all()
        return _Drawn(rows, dataclasses.replace(rows, key=key))

    like = [jax.ShapeDtypeStruct(shape, dtype, weak_type=weak) for shape, dtype, weak in known]
    return jax.eval_shape(both, *jax.tree.unflatten(structure, like))


def _traced(problem: Problem, x: PyTree, y: PyTree, inner: _Drawn, outer: _Drawn) -> list[Traced]:
    losses = check_losses(problem, x, y, inner.without, outer.without)
    found = [losses[name] for name in sorted(losses)]
    return found + _oracles(problem, x, y, inner, outer) if _own(problem) else found


def _own(problem: Problem) -> type | None:
    """The class of a problem that brings oracles of its own."""
    kind = type(problem)
    return kind if own_oracles(kind) else None


def _oracles(problem: Problem, x: PyTree, y: PyTree, inner: _Drawn, outer: _Drawn) -> list[Traced]:
    """The programs of all oracles, on rows as exchanges draw them, with a key, and without."""
    found = []
    for name, vectors in ORACLES.items():
        rows = inner if name in ("hessian_vector", "cross_vector") or name.startswith("inner") else outer
        for drawn in rows:
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

    def value(moved: list[Array], given: list[Array]) -> Float[Array, ""]:
        args = list(given)
        for place, leaf in zip(moving, moved, strict=True):
            args[place] = leaf
        outs = [out for out in function(*args) if jnp.issubdtype(out.dtype, jnp.floating)]
        return sum((jnp.sum(out) for out in outs[1:]), jnp.sum(outs[0]))

    twice = lambda moved, given, direction: jax.jvp(lambda at: jax.grad(value)(at, given), (moved,), (direction,))

    moved = [given[i] for i in moving]
    for derivative, args in ((twice, (moved, given, moved)), (jax.grad(value), (moved, given))):
        with contextlib.suppress(Exception):  # `jax.custom_vjp` has no second one
            return canonical([jax.make_jaxpr(derivative)(*args)]).digest
    return "none"


def settle(algorithm: Module, x: PyTree) -> Module:
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


def class_of(algorithm: PyTree) -> Hashable:
    """What an algorithm's class is known by."""
    return type(algorithm), _CLASSES.get(type(algorithm))


def _settled(optimizer: optax.GradientTransformation, x: PyTree) -> optax.GradientTransformation:
    if isinstance(optimizer.update, Settled):
        return optimizer
    with jax.numpy_dtype_promotion("standard"):
        kept = trace(optimizer.init, x)
        update = trace(optimizer.update, x, jax.eval_shape(lambda: optimizer.init(x)), x)
    name = canonical([kept.jaxpr, update.jaxpr]).digest
    return optimizer._replace(init=Settled(optimizer.init, name), update=Settled(optimizer.update, name))


def settled(function: Callable[..., PyTree], *args: PyTree) -> tuple[Settled, PyTree]:
    """(The same function, equal to others that compute the same at these arguments; the shapes of what it returns)."""
    traced = trace(function, *args)
    found = canonical([traced.jaxpr])
    if found.helpers:  # JAX may know them with numbers of an earlier call
        with _HELPERS(next(_fresh)):
            traced = trace(function, *args)
            found = canonical([traced.jaxpr])
    own = next(_fresh) if found.objects else 0  # called while it runs: a digest cannot see into them
    return Settled(function, digest_of((found.digest, own))), traced.out


class Settled:
    """A function that is equal to others of the same digest."""

    def __init__(self, function: Callable[..., PyTree], digest: str):
        self.function, self.digest = function, digest

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        return self.function(*args, **kwargs)

    def __hash__(self):
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settled) and self.digest == other.digest


class _Same:
    """A Python function as a key: another one is the same if its text is, and all that it has hold of."""

    def __init__(self, value: Callable):
        self.value, self._parts = value, tuple(_parts(value, 0))
        self._hash = hash(tuple(map(id, self._parts)))

    def __hash__(self):
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or len(self._parts) != len(other._parts):
            return False
        return all(a is b for a, b in zip(self._parts, other._parts, strict=True))


def _parts(value: Any, depth: int) -> Iterator[Any]:
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
