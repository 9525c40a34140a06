"""The engines that `--engine` knows and `fb.NAME` offers, a line each; each class has its name on the command line."""

# isort: off
from .simulation import Simulation as Simulation
from .loopback import Loopback as Loopback
