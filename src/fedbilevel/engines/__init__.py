"""Engines: how a server program is run. Those of `shipped` have names on the command line."""

import jax

from . import shipped
from .base import Engine
from .faults import Faults
from .shipped import *  # noqa: F403  what ships is what there is, and a type checker reads it in `shipped`

ENGINES: dict[str, type[Engine]] = {
    kind.name: kind for kind in vars(shipped).values() if isinstance(kind, type) and issubclass(kind, Engine)
}
