"""Tasks, one file each, and their names on the command line."""

from .base import Kind, Options, Task
from .compositional import compositional
from .hyper_representation import hyper_representation
from .loss_tuning import loss_tuning
from .minimax import minimax
from .quadratic import quadratic
from .regularisation import regularisation
from .ridge import ridge

TASKS = {
    kind.name: kind
    for kind in (quadratic, ridge, minimax, compositional, regularisation, hyper_representation, loss_tuning)
}

__all__ = [
    "TASKS", "Kind", "Options", "Task", "compositional", "hyper_representation", "loss_tuning", "minimax", "quadratic",
    "regularisation", "ridge",
]  # fmt: skip
