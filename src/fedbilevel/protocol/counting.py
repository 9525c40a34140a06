"""How often an iteration makes each exchange: a small integer program, evaluated for every number the server may draw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from ..beginning import client_state
from ..canonical import canonical
from ..compiled import CHEAPLY, Kept
from ..jaxprs import ClosedJaxpr, dce_jaxpr, jaxpr_as_fun
from ..problem import Problem
from .abstract import AbstractFederation, Given, Program, unknown
from .sites import Path, Site
from .table import SAMPLED

_COUNTERS: Kept[Callable[..., list[Array]]] = Kept(64)  # compiled, by their programs
_ENUMERATED = 10_000  # server draws with more combinations than this are sampled instead


def combinations(ranges: list[tuple[int, int]], sample: bool) -> tuple[np.ndarray, str]:
    """Rows of numbers the server may draw: all of them, or a sample where they are too many or drawn within loops."""
    number = math.prod(high - low for low, high in ranges)
    if number <= _ENUMERATED and not sample:
        every = list(itertools.product(*(range(*r) for r in ranges)))
        return np.array(every, np.int32).reshape(number, len(ranges)), "exact"
    draw = np.random.default_rng(0)
    return np.stack([draw.integers(low, high, SAMPLED) for low, high in ranges], 1).astype(np.int32), "sampled"


class Counting:
    """Counts per site, (draws, 1 + flags): the program with all but its exchanges cut away.

    Attributes:
        depends: whether the counts depend on data.

    Args:
        by_draw: draws within loops get a key for each row of `draws`.
        most: count every conditional part, and every loop in full.
    """

    def __init__(
        self,
        program: Program,
        problem: Problem,
        given: Given,
        cohort: int,
        sites: Mapping[Path, Site],
        draws: np.ndarray,
        by_draw: bool,
        most: bool,
    ):
        arrays, rest = eqx.partition(given, eqx.is_array)
        leaves, structure = jax.tree.flatten(arrays)

        def run(
            opaque: Float[Array, ""], numbers: Int[Array, " draws"], key: Key[Array, ""], leaves: list[Array]
        ) -> PyTree:
            algorithm, state, data = eqx.combine(jax.tree.unflatten(structure, leaves), rest)
            is_key = lambda a: jnp.issubdtype(a.dtype, jax.dtypes.prng_key)  # what is drawn from it is not from data
            fill = lambda a: a if is_key(a) else jnp.broadcast_to(opaque.astype(a.dtype), a.shape)
            filled = jax.tree.map(fill, state)
            kept = client_state(algorithm, state)
            fed = AbstractFederation(algorithm, problem, data, cohort, key, sites, opaque, numbers, kept, most)
            program(algorithm, fed, filled)
            return fed.counts, fed.taken

        opaque, key = unknown()
        drawn = jax.ShapeDtypeStruct(draws[0].shape, draws.dtype)
        whole, shape = jax.make_jaxpr(run, return_shape=True)(opaque, drawn, key, leaves)
        inputs = [False, True, True, *[False] * len(leaves)]
        kept, used = dce_jaxpr(whole.jaxpr, [True] * len(whole.jaxpr.outvars), instantiate=inputs)
        self.depends, self._used = used[0], used[3:]
        self._structure = jax.tree.structure(shape)
        self._draws, self._keys = draws, _keys(len(draws) if by_draw else None)
        counting = ClosedJaxpr(kept, whole.consts)
        name = canonical([counting]).digest, by_draw, self.depends
        self._run = _COUNTERS.get(name, lambda: _vectorised(jaxpr_as_fun(counting), by_draw, self.depends))
        self._counts: list[np.ndarray] | None = None

    @property
    def varies(self) -> bool:
        """Whether the counts depend on numbers of the algorithm or of the state."""
        return any(self._used)

    def __call__(self, given: Given) -> tuple[PyTree, np.ndarray]:
        """(Counts by site, how many exchanges and draws there are), each with a leading axis of draws."""
        if self._counts is None or any(self._used):
            leaves = jax.tree.leaves(eqx.filter(given, eqx.is_array))
            used = [leaf for leaf, used in zip(leaves, self._used, strict=True) if used]
            self._counts = [np.asarray(count) for count in self._run(self._draws, self._keys, used)]
        return jax.tree.unflatten(self._structure, self._counts)


def _keys(count: int | None) -> Key[Array, " *rows"]:
    """A key for each row of draws; None: one, which decides nothing."""
    key = jax.random.wrap_key_data(
        jax.device_put(np.zeros(2, np.uint32)), impl="threefry2x32"
    )  # `key(0)`, which would be compiled
    return key if count is None else jax.random.split(key, count)


def _vectorised(counting: Callable[..., list[Array]], by_draw: bool, depends: bool) -> Callable[..., list[Array]]:
    opaque = (np.zeros((), jnp.result_type(float)),) if depends else ()
    one = lambda draw, key, used: counting(*opaque, draw, key, *used)
    every = jax.vmap(one, in_axes=(0, 0 if by_draw else None, None))
    return jax.jit(every, compiler_options=dict(CHEAPLY) if jax.default_backend() == "cpu" else None)
