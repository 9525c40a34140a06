"""A stand-in for a run in progress, for callbacks that are told of rows one by one."""

from __future__ import annotations

import types

import fedbilevel as fb
from fedbilevel.callbacks import Running
from helpers.plain import plain


class Told(types.SimpleNamespace):
    """What a callback sees of a run: rows that a test adds, and in `reasons` what the run is stopped for."""

    def __init__(self, *metrics):
        names = [name for name in dir(Running) if not name.startswith("_")]
        super().__init__(**dict.fromkeys(names, lambda *_: None), reasons=[])
        self.history, self.metrics, self.algorithm = fb.History(), dict.fromkeys(metrics), plain(fb.Lockstep)
        self.iteration, self.stop = 0, self.reasons.append

    def tell(self, callback, *rows):
        """Add rows, and have the callback hear of each."""
        for row in rows:
            self.history.add([dict(row)])
            self.iteration = row["iteration"]
            callback.record(self, self.history[-1:])
