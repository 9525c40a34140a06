"""What runs leave in a folder, and its tables and figures."""

from .curves import direction, first_reached, running_median
from .folder import opened
from .kept import keep
from .text import pipe_table
