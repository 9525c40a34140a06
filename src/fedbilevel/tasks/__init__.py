"""Tasks, one file each, and their names on the command line: those of `shipped`."""

from . import shipped
from .base import Kind, Options, Task
from .shipped import *  # noqa: F403  what ships is what there is, and a type checker reads it in `shipped`

TASKS: dict[str, Kind] = {kind.name: kind for kind in vars(shipped).values() if isinstance(kind, Kind)}
