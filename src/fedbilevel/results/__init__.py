"""What runs leave in a folder, and its tables and figures."""

from .curves import direction, first_reached, running_median
from .text import pipe_table
