"""What an iteration exchanges, derived from the algorithm's own program, and how it is written as bytes."""

from ..beginning import as_leaves, client_state
from .abstract import step
from .derivation import check_kinds, protocol, running, trace
from .table import Exchange, Protocol
