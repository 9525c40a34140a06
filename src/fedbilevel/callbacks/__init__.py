"""Callbacks, one file each: what happens beside a run."""

from .base import Callback
from .checkpoint import Checkpoint
from .csv import CSV
from .progress import Progress

__all__ = ["CSV", "Callback", "Checkpoint", "Progress"]
