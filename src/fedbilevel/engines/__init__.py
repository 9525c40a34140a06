"""Engines: how a server program is run."""

from .base import Engine
from .faults import Faults
from .loopback import Loopback
from .simulation import Simulation

__all__ = ["Engine", "Faults", "Loopback", "Simulation"]
