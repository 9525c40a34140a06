"""Compiled programs are let go in time, and garbage is looked for at the right times.

They hold memory maps, of which Linux grants a process 65,530; XLA crashes where it gets no more.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
from collections.abc import Callable, Iterator

import jax

_ENOUGH = 25_000
_SELDOM = 50_000  # objects made between two looks for garbage, where Python's own number is 700 to 2,000


def release(enough: int = _ENOUGH) -> None:
    """Let go of all compiled programs if there are more than `enough` maps; they are compiled again when needed.

    For processes that run very many different programs, such as searches for step sizes. On systems whose processes
    cannot tell their maps there is no such limit, and nothing is let go. Counting 10,000 of them takes a fifth of a second.
    """
    import psutil

    own = psutil.Process()
    if hasattr(own, "memory_maps") and len(own.memory_maps(grouped=False)) > enough:
        jax.clear_caches()
        gc.collect()


def give_back() -> None:
    """Give memory that is free back to the system, where C's library would keep it: the compiler leaves tens of MB."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; other libraries have none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


@contextlib.contextmanager
def seldom_collecting() -> Iterator[None]:
    """Within it Python looks for garbage less often: tracing makes very many objects that stay; a tenth of its time."""
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], _SELDOM) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
