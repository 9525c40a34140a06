"""Programs in a form that tells equal ones from others: what `program.py` and `identity.py` compare.

A function is traced once, and its jaxpr is walked: operations, shapes and types, and every number that it has taken
from Python (a global, a closure's cell, an attribute, a default argument, an array), by its bytes. Names, places in
files and addresses do not count, so that the same text, read again in another process, gives the same digest.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import sys
import types
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .jaxprs import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Tracer, Var

FORM = 1  # of the digests: to be raised where the same program gives another one
_ADDRESS = re.compile(r" at 0x[0-9a-f]+|0x[0-9a-f]{6,}")
_LIBRARIES = tuple(str(Path(module.__file__ or "").parent) for module in (jax, eqx))
_TRUSTED = (*_LIBRARIES, str(Path(__file__).parent))
_NAMES = {"name", "debug_info", "debug", "fwd_debug", "bwd_debug"}  # how a nested function is called
_RULES = {
    "jvp_jaxpr_fun",
    "jvp_jaxpr_thunk",
    "fwd_jaxpr_thunk",
    "fwd",
    "bwd",
    "num_consts",
}  # seen by their derivatives
_FUNCTIONS = {"scan", "while", "cond", "remat2", "checkpoint", "jit", "pjit", "closed_call", "custom_lin"}


class Traced(NamedTuple):
    """A function's program: its jaxpr, with the arrays that it captured, and what it returns (shapes)."""

    jaxpr: ClosedJaxpr
    out: PyTree


def trace(function: Callable, *args: PyTree) -> Traced:
    """Trace a function of pytrees of arrays, whatever JAX knows of it from earlier: it runs, once."""
    other = []

    def anew(*args: PyTree) -> PyTree:  # another function each time: JAX traces no function twice at the same shapes
        arrays, rest = eqx.partition(function(*args), eqx.is_array)
        other.append(rest)
        return arrays

    jaxpr, out = jax.make_jaxpr(anew, return_shape=True)(*args)
    return Traced(jaxpr, eqx.combine(out, other[-1]))


class Canonical(NamedTuple):
    """What a program does.

    Attributes:
        digest: equal for equal programs with equal constants, in every process.
        objects: the Python functions that it calls while it runs (`jax.pure_callback`), which a digest cannot see into.
        rules: whether it has derivatives of the user's own (`jax.custom_jvp`): they are no part of the digest.
        helpers: whether it went through loops or branches, or nested `jit`s, whose functions JAX traces once for all.
        holds: whether arrays stand in it, at any depth, or a number that is somebody's numpy array: JAX keeps numpy's
            arrays as they are, and what is traced reads them again whenever it is lowered.
    """

    digest: str
    objects: tuple[Callable, ...]
    rules: bool
    helpers: bool
    holds: bool


def canonical(traced: Iterable[ClosedJaxpr]) -> Canonical:
    """The canonical form of programs, in this order."""
    writer = Writer()
    for jaxpr in traced:
        writer.value(jaxpr)
    return Canonical(writer.digest(), tuple(writer.objects), writer.rules, writer.helpers, writer.holds)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """An array that nobody holds whole, for its digest: as that of the array.

    Attributes:
        dtype, shape: the array's.
        pieces: () -> its parts along the first axis, one after the other.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[np.ndarray]]


def digest_of(value: PyTree) -> str:
    """A digest of numbers, words, functions and containers of them: equal in every process for equal ones."""
    writer = Writer()
    writer.value(value)
    return writer.digest()


class Writer:
    """Writes values into a digest.

    Attributes:
        libraries: folders of which functions are known by their names.
        objects, rules, helpers, holds: as those of `Canonical`.
    """

    libraries: tuple[str, ...] = _LIBRARIES

    def __init__(self):
        self._hash = hashlib.sha256()
        self._numbers: dict[Var, int] = {}
        self._within: list[int] = []
        self._written: dict[int, int] = {}
        self.objects: list[Callable] = []
        self.rules = self.helpers = self.holds = False

    def digest(self) -> str:
        return self._hash.hexdigest()

    def word(self, *words: Hashable) -> None:
        self._hash.update("\0".join(map(str, words)).encode() + b"\1")

    # Programs ---------------------------------------------------------------------------------------------------

    def program(self, jaxpr: Jaxpr) -> None:
        self.word("program", len(jaxpr.constvars), len(jaxpr.invars), len(jaxpr.outvars))
        for var in (*jaxpr.constvars, *jaxpr.invars):
            self.atom(var)
        for equation in jaxpr.eqns:
            self.word(equation.primitive.name, len(equation.invars), len(equation.outvars))
            for atom in (*equation.invars, *equation.outvars):
                self.atom(atom)
            self.parameters(equation)
        for atom in jaxpr.outvars:
            self.atom(atom)

    def atom(self, atom: Var | Literal) -> None:
        if isinstance(atom, Literal):
            self.word("literal", atom.aval.str_short(), getattr(atom.aval, "weak_type", False))
            self.holds |= _held_elsewhere(atom)
            self.value(np.asarray(atom.val))
            return
        known = atom in self._numbers
        number = self._numbers.setdefault(atom, len(self._numbers))
        self.word(number) if known else self.word(number, atom.aval.str_short(), getattr(atom.aval, "weak_type", ""))

    def parameters(self, equation: JaxprEqn) -> None:
        primitive, params = equation.primitive.name, equation.params
        nested = params.get("call_jaxpr", params.get("jaxpr"))
        if primitive.startswith("custom_") and _RULES & set(params):
            self.rules |= not _of_library(nested)
            self.word("rules of", _source(nested) if _of_library(nested) else "the user")
        self.helpers |= primitive in _FUNCTIONS and not (nested is not None and _of_library(nested))
        skipped = _NAMES if primitive != "name" else set()
        skipped = skipped | (_RULES if primitive.startswith("custom_") else set())
        for name in sorted(set(params) - skipped):
            self.word(name)
            self.value(params[name])

    # Whatever stands in a program ---------------------------------------------------------------------------------

    def value(self, value: Any) -> None:
        if id(value) in self._within:  # a function that refers to itself
            self.word("above", len(self._within) - self._within.index(id(value)))
            return
        self._within.append(id(value))
        self._value(value)
        self._within.pop()

    def _value(self, value: Any) -> None:
        if isinstance(value, ClosedJaxpr):
            self.program(value.jaxpr)
            self.holds |= bool(value.consts)
            self.value(list(value.consts))
        elif isinstance(value, Jaxpr):
            self.program(value)
        elif isinstance(value, Tracer):
            self.word("traced", value.aval.str_short())
        elif isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            self.word("key", jax.random.key_impl(value))
            self.value(jax.random.key_data(value))
        elif isinstance(value, (jax.Array, np.ndarray, np.generic)) or hasattr(value, "__array__"):
            self.array(np.asarray(value))
        elif isinstance(value, Pieces):
            self.word("array", value.dtype, value.shape)
            for piece in value.pieces():
                self._hash.update(_bytes(piece))
        elif isinstance(value, (list, tuple, set, frozenset)):
            items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
            self.word(type(value).__name__, len(items))
            for item in items:
                self.value(item)
        elif isinstance(value, dict):
            self.word("dict", len(value))
            for key in sorted(value, key=repr):
                self.value(key)
                self.value(value[key])
        else:
            self.other(value)

    def counts(self, value: Any) -> bool:
        """Whether a global counts: not modules, classes and what libraries made."""
        numbers = (bool, int, float, complex, str, bytes, tuple, list, dict, np.ndarray, np.generic, jax.Array)
        return isinstance(value, (*numbers, types.FunctionType))

    def array(self, array: np.ndarray) -> None:
        self.word("array", array.dtype, array.shape)
        if array.dtype == object:
            self.value(array.tolist())
        else:
            self._hash.update(_bytes(array))

    def other(self, value: Any) -> None:
        value = _unchecked(value)
        kind = type(value)
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            self.function(value)
        elif isinstance(value, types.CodeType):
            self.word("code", value.co_code.hex(), value.co_names, value.co_varnames)
            self.value(value.co_consts)
        elif isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType, np.ufunc)):
            self.word(getattr(value, "__module__", ""), getattr(value, "__qualname__", value.__name__))
        elif dataclasses.is_dataclass(value):
            self.word(kind.__module__, kind.__qualname__)
            self.value({f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)})
        elif callable(value):
            self.objects.append(value)
            self.word(kind.__module__, kind.__qualname__)
            self.value(dict(getattr(value, "__dict__", {})))
        else:
            self.word(kind.__module__, kind.__qualname__, _ADDRESS.sub("", repr(value)))

    def function(self, value: types.FunctionType | types.MethodType | functools.partial) -> None:
        """A function by its text and what it has hold of."""
        if isinstance(value, functools.partial):
            self.value((value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            self.value((value.__func__, value.__self__))
        elif value.__code__.co_filename.startswith(self.libraries):
            self.word("function", value.__module__, value.__qualname__)
            self.value([_content(cell) for cell in value.__closure__ or ()])
        elif id(value) in self._written:
            self.word("again", self._written[id(value)])
        else:
            self._written[id(value)] = len(self._written)
            self.objects.append(value)  # and so alive: no other takes its place in memory
            self.value((value.__code__, value.__defaults__, value.__kwdefaults__))
            self.value([_content(cell) for cell in value.__closure__ or ()])
            self.value({name: value.__globals__[name] for name in _read(value, self.counts)})


def _bytes(array: np.ndarray) -> memoryview:
    """What `tobytes` gives, without a copy of an array whose numbers lie in order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _held_elsewhere(literal: Literal) -> bool:
    """Whether a number of a program is a numpy array () that somebody else has hold of, and so may change.

    JAX keeps a view of it (0.10), as it does of an array that it has made of a Python number: that one is the view's alone.
    """
    base = getattr(literal.val, "base", None)
    alone = 3  # the view, the name above, the argument below
    return isinstance(base, np.ndarray) and sys.getrefcount(base) > alone


def _unchecked(value: PyTree) -> PyTree:
    """A function without what checks its annotations (jaxtyping and its like hide from tracebacks): it computes nothing."""
    hides = lambda value: "__tracebackhide__" in value.__code__.co_varnames and hasattr(value, "__wrapped__")
    while isinstance(value, types.FunctionType) and hides(value):
        value = value.__wrapped__
    return value


def digest_of_class(kind: type) -> str:
    """A digest of the functions of a class and of its bases, but for libraries' and this package's own."""
    writer = Writer()
    for each in kind.__mro__:
        functions = {
            name: _unchecked(value) for name, value in vars(each).items() if isinstance(value, types.FunctionType)
        }
        writer.value({n: f for n, f in functions.items() if not f.__code__.co_filename.startswith(_TRUSTED)})
    return writer.digest()


def _read(function: types.FunctionType, counts: Callable[[Any], bool]) -> list[str]:
    """The globals that a function and those within it may read, of those that count."""
    codes, names = [function.__code__], set()
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return sorted(name for name in names if name in function.__globals__ and counts(function.__globals__[name]))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _source(nested: Jaxpr | ClosedJaxpr | None) -> str:
    """Where a nested program's function stands: `relu at .../jax/_src/nn/functions.py`."""
    jaxpr = nested.jaxpr if isinstance(nested, ClosedJaxpr) else nested
    place = str(getattr(getattr(jaxpr, "debug_info", None), "func_src_info", None) or "")
    name, _, file = place.partition(" at ")
    for library in _LIBRARIES:
        file = file.removeprefix(library)
    return f"{name} at {file.rpartition(':')[0]}"


def _of_library(nested: Jaxpr | ClosedJaxpr | None) -> bool:
    jaxpr = nested.jaxpr if isinstance(nested, ClosedJaxpr) else nested
    place = str(getattr(getattr(jaxpr, "debug_info", None), "func_src_info", None) or "")
    return place.partition(" at ")[2].startswith(_LIBRARIES)
