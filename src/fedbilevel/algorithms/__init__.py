"""The algorithms, one file each, and their names on the command line."""

from typing import Any

from ..algorithm import Algorithm
from .aggitd import AggITD
from .fednest import FedNest, FedNestSGD
from .lfednest import LFedNest, LFedNestSVRG
from .lockstep import Lockstep

ALGORITHMS = {
    "aggitd": AggITD,
    "fednest": FedNest,
    "fednest-sgd": FedNestSGD,
    "lfednest": LFedNest,
    "lfednest-svrg": LFedNestSVRG,
    "lockstep": Lockstep,
}

BIASED = frozenset({"lfednest", "lfednest-svrg"})  # those whose hypergradient is local, and biased where clients differ


def checked(name: str) -> tuple[Algorithm, Algorithm | None]:
    """An algorithm as the conformance suite runs it: with every option at work, and set to be exact (None if it cannot)."""
    kind: Any = ALGORITHMS[name]
    busy: dict[str, Any] = {"local_steps": 2, "outer_steps": 2, "batch_size": 2, "inner_lr": 0.05, "outer_lr": 0.05}
    if kind is Lockstep:  # it has no estimator
        return kind(**busy, hessian_lr=0.1), None
    busy |= {"inner_rounds": 2, "hessian_lr": 0.1}
    if name in BIASED:
        return kind(**busy), None
    many: dict[str, Any] = {"inner_rounds": 600} if kind is AggITD else {"inner_rounds": 600, "neumann_terms": 600}
    exact = {"local_steps": 1, "inner_lr": 0.15, "hessian_lr": 0.15, "outer_lr": 0.05, "truncation": "full"}
    return kind(**busy), kind(**exact, **many)


__all__ = ["ALGORITHMS", "BIASED", "AggITD", "FedNest", "FedNestSGD", "LFedNest", "LFedNestSVRG", "Lockstep", "checked"]
