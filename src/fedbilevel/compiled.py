"""Compiled programs, shared between problems that compute the same; of those that were not used for long none is kept."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from . import cache
from .arrays import Concrete, Structure, on_device
from .jaxprs import Tracer
from .memory import give_back
from .problem import Problem, told_by, told_of_reverse_rules
from .processes import whole_over
from .program import Program, class_of, compiled_as, helpers_of, known_as, program_of

KEPT = 16  # programs kept compiled: 5 to 15 MB each
TRACED = 8  # problems of which parts are kept traced: about 2 MB each

_ARRAY = object()  # where an array stood

Options: TypeAlias = tuple[tuple[str, bool | int | float | str], ...]  # of the compiler
CHEAPLY: Options = (
    ("xla_backend_optimization_level", 0),
    ("xla_llvm_disable_expensive_passes", True),
    ("xla_cpu_use_fusion_emitters", False),
    ("xla_cpu_parallel_codegen_split_count", 1),
)  # for what runs once or a few times: compiling is what it costs

# of programs whose time goes elsewhere, on processors: XLA's own threads would only stand in the way; and what is left to it
# is as fast so as in full, in a fifth of the memory for compiling and two thirds of the time
LIGHTLY: Options = (
    ("xla_cpu_multi_thread_eigen", False),
    ("xla_backend_optimization_level", 1),
    ("xla_llvm_disable_expensive_passes", True),
    ("xla_cpu_use_fusion_emitters", False),
    ("xla_cpu_parallel_codegen_split_count", 1),
)

Static: TypeAlias = tuple[Hashable, ...]  # leaves, or what stands in the place of arrays
Thing = TypeVar("Thing")


def run(
    function: Callable[..., PyTree],
    problem: Problem,
    algorithm: PyTree,
    *args: PyTree,
    options: Options = (),
    spent: PyTree = None,
) -> PyTree:
    """`function(problem, algorithm, *args)`, compiled; what is compiled is shared between equal frozen problems.

    Args:
        function: of a module; it returns a pytree of arrays.
        algorithm: an algorithm (or None) whose numbers are arrays (`as_leaves`).
        args: pytrees; leaves that are no arrays are static, and must be hashable.
        options: of the compiler.
        spent: arrays among `args` that nobody needs any more: what is returned may take their place in memory.
    """
    return Bound(function, problem, algorithm, options)(*args, spent=spent)


def traced(function: Callable[..., PyTree], problem: Problem, algorithm: PyTree, *args: PyTree) -> PyTree:
    """As `run`, as a part of a program that is being traced: traced once for all programs that hold it at these shapes.

    Traced anew where the losses hold arrays (`Program.holds`): what is kept would have numpy's as they are later.

    Arguments that are one array stay one, so that what is known by its very arrays (features by their x) stays known.
    """
    if not sharable(problem):
        return function(problem, algorithm, *args)
    leaves, structure = jax.tree.flatten(args)
    arrays, static = _apart(leaves)
    number: dict[int, int] = {}
    places = tuple(number.setdefault(id(array), len(number)) for array in arrays)
    apart = list({id(array): array for array in arrays}.values())
    return Bound(function, problem, algorithm, (), _TRACED).at(_Static(static, structure, places), apart)


def sharable(problem: Problem) -> bool:
    """Whether it is known what the losses compute, and they hold no arrays."""
    program = program_of(problem)
    return program is not None and not program.holds


class Bound:
    """`run` for one problem and algorithm, to be called often."""

    def __init__(
        self,
        function: Callable[..., PyTree],
        problem: Problem,
        algorithm: PyTree,
        options: Options = (),
        kept: Kept[_Compiled] | None = None,
    ):
        cache.begin()
        own, rest = eqx.partition(problem, eqx.is_array)  # numpy's are constants, as they are in the trace
        self._own, structure = jax.tree.flatten(own)
        leaves, whole = jax.tree.flatten(algorithm)
        self._algorithm, static = _apart(leaves)
        self._now = _Now(rest, structure, program_of(problem), static, whole)
        self._problem = problem
        self._compiled = (_KEPT if kept is None else kept).get(
            (compiled_as(problem), class_of(algorithm), whole, static, function, options),
            lambda: _Compiled(function, options),
        )

    def __call__(self, *args: PyTree, spent: PyTree = None) -> PyTree:
        leaves, structure = jax.tree.flatten(args)
        arrays, static = _apart(leaves)
        if spent is None:
            return self.at(_Static(static, structure), arrays)
        gone = {id(leaf) for leaf in jax.tree.leaves(spent)}
        order = sorted(range(len(arrays)), key=lambda place: id(arrays[place]) in gone)
        kept = [arrays[place] for place in order if id(arrays[place]) not in gone]
        where = tuple(int(place) for place in np.argsort(order))
        return self.at(_Static(static, structure, where), kept, [arrays[place] for place in order[len(kept) :]])

    def given(self, *first: PyTree) -> Callable[..., PyTree]:
        """The same with its first arguments given once for all; the leaves of the others are arrays."""
        before, known = _apart(jax.tree.leaves(first))
        statics: dict[Structure, _Static] = {}

        def call(*rest: PyTree) -> PyTree:
            arrays, structure = jax.tree.flatten(rest)
            if structure not in statics:
                whole = jax.tree.structure((*first, *rest))
                statics[structure] = _Static((*known, *[_ARRAY] * len(arrays)), whole)
            return self.at(statics[structure], before + arrays)

        return call

    def at(self, static: _Static, arrays: list[Concrete], spent: list[Concrete] | None = None) -> PyTree:
        """The value at these arrays, and others after them whose memory it may take."""
        with helpers_of(self._problem), told_of_reverse_rules():  # JAX may find such a rule after the oracle's end only
            given = _Given(self._now, static, self._own, self._algorithm, arrays, spent or [])
            if not self._problem.on_host:
                return self._compiled(given)
            with told_by(self._problem):  # and so what it raises has to come up here
                program = self._compiled.ready(given)
                return self._compiled(given) if program is None else self._problem.serving(program)


def _apart(leaves: list[PyTree]) -> tuple[list[Concrete], Static]:
    """(The arrays, what stands in their places: itself where it is none)."""
    is_array = [isinstance(leaf, (jax.Array, np.ndarray, np.generic)) for leaf in leaves]
    arrays = [leaf for leaf, array in zip(leaves, is_array, strict=True) if array]
    return arrays, tuple(_ARRAY if array else leaf for leaf, array in zip(leaves, is_array, strict=True))


def _together(static: Static, structure: Structure, arrays: Sequence[Concrete]) -> PyTree:
    left = iter(arrays)
    return jax.tree.unflatten(structure, [next(left) if leaf is _ARRAY else leaf for leaf in static])


class _Compiled:
    """A function compiled for a program, for the shapes it has met.

    What JAX knows it by does not refer to this: programs that are forgotten are gone at once, not when Python next
    looks for objects that hold on to each other.
    """

    def __init__(self, function: Callable[..., PyTree], options: Options):
        self._call = _Call()
        self._ahead: dict[Hashable, Callable[..., PyTree]] = {}  # compiled before they are called
        self._lightly: dict[str, Any] | None = dict(LIGHTLY + options) if jax.default_backend() == "cpu" else None
        named = functools.partial(_traced, function, self._call)
        functools.update_wrapper(named, function)  # what JAX calls it in its log and in profiles
        # over several processes, all results lie whole in each: so that each can read them
        self._jitted = functools.cache(
            lambda place: jax.jit(
                named,
                static_argnums=0,
                donate_argnums=4,
                compiler_options=dict(options) or None,
                out_shardings=place,
            )
        )

    def ready(self, given: _Given) -> Callable[[], PyTree] | None:
        """The call, compiled: it may be made in another thread. None within a program that is being traced."""
        now, static, *parts = given
        there = jax.lax.add(np.float32(0), np.float32(0))  # a tracer wherever JAX traces
        if any(isinstance(leaf, Tracer) for leaf in (there, *itertools.chain(*parts))):
            return None
        on_it = lambda leaf: leaf if isinstance(leaf, jax.Array) else on_device(np.asarray(leaf))
        held = [[on_it(leaf) for leaf in part] for part in parts]
        kind = lambda leaf: (leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False))
        place = whole_over(given.arrays)
        key = static, tuple(tuple(map(kind, part)) for part in held), place
        if key not in self._ahead:
            with self._call.being(now):
                self._ahead[key] = self._jitted(place).lower(static, *held).compile(self._lightly)
            give_back()
        compiled = self._ahead[key]
        return lambda: jax.block_until_ready(compiled(*held))

    def __call__(self, given: _Given) -> PyTree:
        now, static, *parts = given
        with self._call.being(now):
            return self._jitted(whole_over(given.arrays))(static, *parts)


class _Now(NamedTuple):
    """What a problem and an algorithm are beside their arrays.

    Attributes:
        problem, structure: the problem without arrays; the structure of its arrays.
        program: what it computes.
        static, whole: the algorithm's leaves, where it has no arrays, and its structure.
    """

    problem: Problem
    structure: Structure
    program: Program | None
    static: Static
    whole: Structure


class _Given(NamedTuple):
    """What a call is made with.

    Attributes:
        own, algorithm, arrays, spent: arrays: the problem's, the algorithm's, of the arguments, and of those whose memory
            it may take.
    """

    now: _Now
    static: _Static
    own: list[Concrete]
    algorithm: list[Concrete]
    arrays: list[Concrete]
    spent: list[Concrete]


class _Call:
    """The call that is being made."""

    def __init__(self):
        self.now: _Now | None = None

    @contextlib.contextmanager
    def being(self, now: _Now) -> Iterator[None]:
        """Within it, it is this one."""
        before, self.now = self.now, now
        try:
            yield
        finally:
            self.now = before


def _traced(
    function: Callable[..., PyTree],
    call: _Call,
    static: _Static,
    own: list[Concrete],
    algorithm: list[Concrete],
    arrays: list[Concrete],
    spent: list[Concrete],
) -> PyTree:
    now = call.now  # of this very call, not of the one that was compiled first
    assert now is not None
    problem = known_as(eqx.combine(jax.tree.unflatten(now.structure, own), now.problem), now.program)
    given = [
        leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for leaf in [*arrays, *spent]
    ]  # numpy's, without jit
    return function(problem, _together(now.static, now.whole, algorithm), *static.together(given))


class _Static:
    """Leaves that are no arrays, as a key.

    Args:
        places: which of the arrays stands at each place, where some are one; None: each has one place.
    """

    def __init__(self, leaves: Static, structure: Structure, places: tuple[int, ...] | None = None):
        self._key = leaves, structure, places
        self._hash = hash(self._key)

    def together(self, arrays: Sequence[Concrete]) -> PyTree:
        """All of it, with arrays in their places."""
        leaves, structure, places = self._key
        return _together(leaves, structure, arrays if places is None else [arrays[place] for place in places])

    def __hash__(self):
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._key == other._key


class Kept(Generic[Thing]):
    """The latest `most` things by key; those not asked for the longest are forgotten."""

    def __init__(self, most: int):
        self.most = most
        self._held: collections.OrderedDict[Hashable, Thing] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable, make: Callable[[], Thing]) -> Thing:
        """What is held for a key, made if need be."""
        if key not in self._held:
            made = make()
            self._held[key] = made
        self._held.move_to_end(key)
        while len(self._held) > self.most:
            self._held.popitem(last=False)
        return self._held[key]


_KEPT: Kept[_Compiled] = Kept(KEPT)
_TRACED: Kept[_Compiled] = Kept(TRACED)
