"""What each algorithm costs and needs, and when to use it: the lines of `fedbilevel list`."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..algorithm import Algorithm

# name -> (rounds of an iteration: T and N are inner_rounds and neumann_terms, but for AggITD, whose N is inner_rounds;
#          when to use it)
_LINES = {
    "aggitd": ("2N+3", "rounds are dear and clients differ; N = 1 with truncation=full to start with"),
    "fednest": ("2T+N+3", "the series at the last y; truncation=full for comparisons at equal work"),
    "fednest-sgd": ("T+N+3", "one local step, where the anchor round would be idle"),
    "lfednest": ("T+1", "clients are alike and rounds very dear; off the solution where they differ"),
    "lfednest-svrg": ("2T+1", "as lfednest, with a lower level at y*"),
    "lockstep": ("1", "the fewest rounds where clients differ; the longest messages"),
    "fedmbo": ("T+N+1", "sampled clients: the variance falls with the number of chains; at most so many rounds"),
    "simfbo": ("1", "short messages, one local step; a floor for more"),
    "shrofbo": ("1", "as simfbo, where clients take unequal numbers of local steps"),
    "memfbo": ("1", "as simfbo, where there are no second derivatives"),
    "fedbio": ("1", "simfbo with a server step of one"),
    "fedbioacc": ("1", "minibatches: directions followed by STORM"),
    "fedbioacc-local": ("1", "another problem: every client has a lower level of its own"),
    "fedmsa": ("2", "all clients can be asked each iteration; many local steps without a floor"),
    "localbsgm": ("1", "clients are alike, minibatches: momentum; off the solution where they differ"),
    "localbsgvrm": ("1", "as localbsgm, with STORM"),
    "adafbio": ("1", "as localbsgvrm, with adaptive steps"),
    "fedf2sa": ("T+1", "the lower level is too large for second derivatives; off by 1 / penalty"),
}


@dataclasses.dataclass(frozen=True)
class About:
    """A line about an algorithm.

    Attributes:
        summary: what it is.
        rounds: of one iteration (for FedNest's family with truncation=full; the most, where the server draws).
        order: of the derivatives that it asks for, "first" or "second".
        state: whether clients keep anything between rounds.
        asks: "cohort", or "all" where an exchange asks everybody.
        when: when to use it.
    """

    summary: str
    rounds: str
    order: str
    state: bool
    asks: str
    when: str


def about(name: str) -> About:
    """The line about an algorithm, by its name on the command line."""
    from . import ALGORITHMS, FIRST_ORDER

    kind: Any = ALGORITHMS[name]
    rounds, when = _LINES[name]
    summary = (kind.__doc__ or "").strip().splitlines()[0]
    order = "first" if name in FIRST_ORDER else "second"
    keeps = kind.client_init is not Algorithm.client_init
    return About(summary, rounds, order, keeps, "all" if name == "fedmsa" else "cohort", when)
