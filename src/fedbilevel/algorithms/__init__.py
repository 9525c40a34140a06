"""The algorithms, one file each, and their names on the command line."""

from typing import Any

from ..algorithm import Algorithm
from .aggitd import AggITD
from .fednest import FedNest, FedNestSGD
from .lfednest import LFedNest, LFedNestSVRG

ALGORITHMS = {
    "aggitd": AggITD,
    "fednest": FedNest,
    "fednest-sgd": FedNestSGD,
    "lfednest": LFedNest,
    "lfednest-svrg": LFedNestSVRG,
}

BIASED = frozenset({"lfednest", "lfednest-svrg"})  # those whose hypergradient is local, and biased where clients differ


def checked(name: str) -> tuple[Algorithm, Algorithm | None]:
    """An algorithm as the conformance suite runs it: with every option at work, and set to be exact (None if it cannot)."""
    kind = ALGORITHMS[name]
    steps: dict[str, Any] = {"inner_lr": 0.05, "hessian_lr": 0.1, "outer_lr": 0.05}
    busy = kind(inner_rounds=2, local_steps=2, outer_steps=2, batch_size=2, **steps)
    if name in BIASED:
        return busy, None
    many: dict[str, Any] = {"inner_rounds": 600} if kind is AggITD else {"inner_rounds": 600, "neumann_terms": 600}
    return busy, kind(local_steps=1, inner_lr=0.15, hessian_lr=0.15, truncation="full", **many)


__all__ = ["ALGORITHMS", "BIASED", "AggITD", "FedNest", "FedNestSGD", "LFedNest", "LFedNestSVRG", "checked"]
