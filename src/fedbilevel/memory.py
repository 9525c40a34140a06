"""Compiled programs hold memory maps, of which Linux grants a process 65,530; XLA crashes where it gets no more."""

from __future__ import annotations

import gc

import jax

_ENOUGH = 25_000


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
