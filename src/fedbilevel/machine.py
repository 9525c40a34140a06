"""What must agree for a compiled program to be used again: versions, and what the processor can do."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from pathlib import Path
from typing import NamedTuple

import jax

from .jaxprs import jaxlib_version

_PROCESSORS = Path("/proc/cpuinfo")
_TOLD = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU part", "isa")


class Machine(NamedTuple):
    """`told`: all that must agree, as text; `folder`: a name made of it."""

    told: str
    folder: str


@functools.cache
def machine() -> Machine:
    """This one. JAX's own key holds the compiler's version and flags, the devices and the options, but not the number of
    cores, for which loops are split."""
    versions = f"jax-{jax.__version__}-jaxlib-{jaxlib_version}"
    system = f"{platform.system()}-{platform.machine()}".lower()
    told = "\n".join([versions, system, f"cores {cores()}", *_processor()])
    short = hashlib.sha256(told.encode()).hexdigest()[:16]
    return Machine(told, f"{versions}-{system}-{short}")


def cores() -> int:
    """As many as this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> list[str]:
    """Model and instruction sets: of the first of several alike."""
    try:
        with _PROCESSORS.open() as lines:
            return _first(lines.read(2**16))
    except OSError:
        return [platform.processor(), platform.version()]


def _first(text: str) -> list[str]:
    lines = [line for line in text.split("\n\n")[0].splitlines() if line.split("\t")[0].split(":")[0].strip() in _TOLD]
    return lines
