"""Looking for step sizes: a whole grid of them in one program."""

from .grid import Curve, points, sweep
from .search import Found, search
