"""How a simulated run is compiled: quickly, or in full; "auto" measures which of the two pays.

Compiled quickly (XLA's older emitters, LLVM at level 0), a program of an iteration is there in a sixth of the time; its
iterations take 2.5 to 3.3 times as long, and float32 numbers differ in the last places (by about 5e-8 after a few
iterations). See `benchmarks/first_answer.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
from jaxtyping import PyTree

from ...algorithm import Algorithm
from ...compiled import CHEAPLY, Kept, Options
from ...errors import check
from ..base import Carry

Way: TypeAlias = Literal["quick", "full"]

QUICK: Options = CHEAPLY
PAYS = 2.3  # seconds of quick iterations from which on compiling in full is the shorter way
PAYS_ON_HOST = 10.0  # where Python computes the oracles, and the program the rest: a fifth of the time, or much less

_PACES: Kept[float] = Kept(64)  # seconds of an iteration of a quick program, once measured


class Ahead(NamedTuple):
    """An iteration that was run before `advance` asked for it.

    Attributes:
        algorithm, carry, limit: of which, from where.
        out, seconds: what the program gave, and how long it took.
    """

    algorithm: Algorithm
    carry: Carry
    limit: float
    out: PyTree
    seconds: float

    def of(self, algorithm: Algorithm, carry: Carry, limit: float) -> bool:
        """Whether it is the one that is asked for."""
        return self.algorithm is algorithm and self.carry is carry and self.limit == limit


def check_way(compile: str) -> None:
    """Refuse what is no way to compile."""
    check(
        compile in ("auto", "quick", "full"),
        f"compile= is 'auto', 'quick' or 'full'; got {compile!r}.",
    )
    check(
        compile != "quick" or on_cpu(),
        f"compile='quick' is for CPUs, and JAX runs on {jax.default_backend()} here: leave it out.",
    )


def on_cpu() -> bool:
    """Whether JAX runs on CPUs."""
    return jax.default_backend() == "cpu"


def open_to_choice(processes: int, on_host: bool) -> bool:
    """Whether "auto" may choose: on a CPU, in one process, and in 32 bits. Elsewhere it is "full".

    In 64 bits too where Python computes the oracles.
    """
    wide = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    return on_cpu() and (on_host or not wide) and processes == 1


def chosen(iterations: int, kind: tuple, pace: Callable[[], float], on_host: bool) -> Way:
    """What is sooner there for so many iterations: a function of their number and their measured cost.

    Args:
        kind: what the program is known by; its cost is measured once in a process, so that runs alike choose alike.
        pace: seconds of an iteration of the quick program, by running one.
        on_host: whether Python computes the oracles.
    """
    if iterations == 1:
        return "quick"
    return "full" if iterations * _PACES.get(kind, pace) > (PAYS_ON_HOST if on_host else PAYS) else "quick"
