"""Engines: how a server program is run."""

from .base import Engine
from .loopback import Loopback
from .simulation import Simulation

__all__ = ["Engine", "Loopback", "Simulation"]
