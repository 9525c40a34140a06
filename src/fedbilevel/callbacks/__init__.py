"""Callbacks, one file each: what happens beside a run."""

from .base import Callback, Row, Running
from .progress import Meter
from .shipped import *  # noqa: F403  what ships is what there is, and a type checker reads it in `shipped`
