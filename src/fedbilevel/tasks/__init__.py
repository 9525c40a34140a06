"""Tasks, one file each, and their names on the command line."""

from .base import Kind, Options, Task
from .hyper_representation import hyper_representation
from .quadratic import quadratic
from .regularisation import regularisation
from .ridge import ridge

TASKS = {kind.name: kind for kind in (quadratic, ridge, regularisation, hyper_representation)}

__all__ = ["TASKS", "Kind", "Options", "Task", "hyper_representation", "quadratic", "regularisation", "ridge"]
