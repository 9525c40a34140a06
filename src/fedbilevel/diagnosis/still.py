"""What to say at the end of a run in which `outer_lr="auto"` has not let x go."""

from __future__ import annotations

import numpy as np
from jaxtyping import PyTree

from ..algorithm import Algorithm
from ..component import title_of
from ..engines.base import Carry, Record
from ..errors import warn
from ..pace.automatic import found_in, numbered
from ..pace.curvature import Curvature
from ..pace.outer import Pace
from ..watch import attributes

LEAST = 30  # iterations from which on it is said: a short run is one that somebody tries


def never_moved(state: PyTree) -> bool:
    """Whether x has an automatic step and waits still."""
    pace = attributes(state).get("pace")
    return isinstance(pace, Pace) and int(np.asarray(pace.moves)) == 0


def tell_still(algorithm: Algorithm, carry: Carry, last: Record) -> None:
    """Warn, in a sentence, where x has never moved since the run began or last went back, though it has a way to go."""
    memory = attributes(carry.state).get("memory")
    if "outer_lr" not in found_in(algorithm) or not isinstance(memory, Curvature):
        return
    if carry.iteration < LEAST or not never_moved(carry.state):
        return
    length = getattr(last.info, "hypergradient_norm", None)
    if length is not None and not np.asarray(length)[-1] > 0:
        return
    back, local = int(np.asarray(memory.halvings)), getattr(numbered(algorithm), "local_steps", None)
    times = "once" if back == 1 else f"{back} times"
    why = f"; the run has gone back {times} and takes shorter steps since" if back else ""
    more = "more rounds" if local is None else f"more rounds or local_steps (now {local})"
    warn(
        f'x is where it started, after {carry.iteration} iterations of {title_of(algorithm)}: with outer_lr="auto" it '
        f"waits until y has settled, and y has not{why}. Give {more}, or outer_lr a number."
    )
