"""Compiled programs hold memory maps, of which Linux grants a process 65,530; XLA crashes where it gets no more."""

from __future__ import annotations

import gc
from pathlib import Path

import jax

_MAPS, _ENOUGH = Path("/proc/self/maps"), 25_000


def release(enough: int = _ENOUGH) -> None:
    """Let go of all compiled programs if there are more than `enough` maps; they are compiled again when needed."""
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > enough:  # elsewhere there is no such limit
        jax.clear_caches()
        gc.collect()
