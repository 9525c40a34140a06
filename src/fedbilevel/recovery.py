"""Going back after a blow-up: where steps are found while running they are halved, and a run goes on.

A run with an automatic step keeps a snapshot: the server's state, the clients' states (over a
network, the tags that say which counted) and the iteration, and so the keys. It is taken after
every 20th iteration whose state is of ordinary size; stretches end there, so that it does not
depend on how fast a machine is. A checkpoint holds it too.

When an iteration blows up (a number is not finite, or out of range, or the state raises its alarm,
see `pace.curvature`), it is taken again from the last good iterate, with a measurement. If it
was an alarm, and the step is found to have been right, the run goes on from there. (Clients that
move before the factors act may have met another curvature on their way: the iteration is then taken
with half the step first, which makes what is right half as long at the least, and shortens much
more what a step beyond 2/L has thrown.) Else it goes back to the snapshot, and halves the step.
Iterations after the snapshot are given up: their rows leave the history, their rounds, bytes and
seconds stay counted. After ten times the next blow-up ends the run. A step that is a number is
never changed.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from jaxtyping import PyTree

from . import arrays
from .algorithm import Algorithm
from .callbacks.checkpoint import FILE, read
from .diagnosis import largest
from .engines.base import Carry, Execution, Record
from .pace.automatic import found_in
from .pace.curvature import EVERY, HALVINGS, automatic, remembered, remembering

_ORDINARY = 1e3  # how far beyond the start's size x and y may be in a snapshot


@dataclasses.dataclass(frozen=True)
class Back:
    """Where a run goes on after a blow-up.

    Attributes:
        carry: from there.
        tried: what the iteration did each time that it was taken again; none if there were too few rounds for it.
        last: where it was taken again, if the run goes on from its end; None: the run has gone back to the snapshot.
    """

    carry: Carry
    tried: list[Record]
    last: Carry | None


class Recovery:
    """Where a run with an automatic step can go back to.

    Attributes:
        snapshot: the carry to go back to.
    """

    def __init__(self, execution: Execution, algorithm: Algorithm, start: Carry):
        self._execution, self._algorithm = execution, algorithm
        step = automatic(algorithm)
        self._probes = step is not None and step.local_factors
        self._settings = _automatic_settings(algorithm)
        self._size = _ORDINARY * max(1.0, largest((start.state.x, start.state.y)))
        self.snapshot = start

    @property
    def halvings(self) -> int:
        """How often the run has gone back, and halved its step, so far."""
        return int(remembered(self.snapshot.state).halvings)

    def until_snapshot(self, iteration: int) -> int:
        """Iterations until the next one."""
        return EVERY - iteration % EVERY

    def note(self, carry: Carry) -> Carry:
        """Take a snapshot, if it is time; returns the carry to go on from.

        Where a network's sites began their states anew, what was before is gone: the snapshot is then this carry.
        """
        began = carry.iteration - int(remembered(carry.state).iteration)
        before = self.snapshot.iteration - int(remembered(self.snapshot.state).iteration)
        if began != before:
            memory = remembered(carry.state)
            state = remembering(carry.state, memory.halved(self.halvings, memory, memory))
            self.snapshot = carry = dataclasses.replace(carry, state=state)
        elif carry.iteration % EVERY == 0 and self._ordinary(carry.state):
            self.snapshot = carry
        return carry

    def _ordinary(self, state: PyTree) -> bool:
        return largest((state.x, state.y)) <= self._size and remembered(state).calm

    def back(self, last: Carry, failed: Carry, limit: float, spare: int | None) -> Back | None:
        """Take the iteration again that blew up, or go back.

        Args:
            last: after the last good iteration.
            failed: after the one that blew up.
            spare: rounds that are left, or None.

        Returns:
            None: the run has gone back as often as it may.
        """
        if self.halvings >= HALVINGS:
            return None
        before, after = remembered(last.state), remembered(failed.state)
        tried, seen, right = [], failed, False
        takes = self._takes(last, failed)
        if spare is None or spare >= len(takes) * self._execution.protocol.rounds_most:
            for state in takes:
                asking = dataclasses.replace(last, state=state)
                seen, record = self._execution.advance(self._algorithm, asking, 1, limit)
                tried.append(record)
                right = record.finite and not before.too_large(remembered(seen.state))
                right = right and not after.made_by_step(remembered(seen.state))
                if not right:
                    break
            if right and after.alarmed:
                return Back(seen, tried, last)
        memory = remembered(self.snapshot.state).halved(self.halvings + 1, before, remembered(seen.state))
        self.snapshot = dataclasses.replace(self.snapshot, state=remembering(self.snapshot.state, memory))
        return Back(self.snapshot, tried, None)

    def _takes(self, last: Carry, failed: Carry) -> list[PyTree]:
        """The states from which the iteration is taken again, each measuring.

        Where clients move before the factors act, no measurement tells of the curvature that they met on their way:
        there, half the step comes first.
        """
        again = remembered(last.state).measuring()
        probed = self._probes and remembered(failed.state).alarmed
        takes = [again.with_half_the_step(), again] if probed else [again]
        return [remembering(last.state, memory) for memory in takes]

    def spent(self, why: str) -> str:
        """The sentence that ends the run, with what was tried before."""
        return f"{why} (The automatic {self._settings} had been halved {self.halvings} times by then.)"


def _automatic_settings(algorithm: Algorithm) -> str:
    """The names of the steps that are found while running, in words."""
    fields = [field.name for field in dataclasses.fields(algorithm) if field.metadata.get("role") == "rate"]
    names = found_in(algorithm) or [name for name in fields if isinstance(getattr(algorithm, name), str)]
    return " and ".join([", ".join(names[:-1])] * (len(names) > 1) + [*names[-1:]])


def recovery(execution: Execution, algorithm: Algorithm, start: Carry) -> Recovery | None:
    """None where the run does not go back: its steps are all the user's."""
    return None if automatic(algorithm) is None else Recovery(execution, algorithm, start)


def saved_snapshot(folder: str | os.PathLike[str], start: Carry) -> Carry:
    """The snapshot that a checkpoint holds."""
    like = {"snapshot": start.state, "snapshot_client_state": start.client_state}
    head, parts = read(Path(folder) / FILE, like)
    state, client_state = (arrays.restore(tree, parts[name]) for name, tree in like.items())
    return Carry(state, client_state, int(head["snapshot"]))
