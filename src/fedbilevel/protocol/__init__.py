"""What an iteration exchanges, derived from the algorithm's own program, and how it is written as bytes."""

from .derivation import as_leaves, check_kinds, client_state, protocol, step, trace
from .table import Exchange, Protocol
