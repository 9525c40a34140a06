"""Tasks, one file each, and their names on the command line."""

from .base import Kind, Options, Task
from .hyper_representation import hyper_representation
from .loss_tuning import loss_tuning
from .quadratic import quadratic
from .regularisation import regularisation
from .ridge import ridge

TASKS = {kind.name: kind for kind in (quadratic, ridge, regularisation, hyper_representation, loss_tuning)}

__all__ = [
    "TASKS", "Kind", "Options", "Task", "hyper_representation", "loss_tuning", "quadratic", "regularisation", "ridge",
]  # fmt: skip
