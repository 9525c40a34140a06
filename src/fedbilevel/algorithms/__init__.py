"""The algorithms, and their names on the command line.

A file holds one method with its variants; what several share has a file of its own: the local steps and the estimates they
go along (`steps`), the directions (`directions`), the Neumann series (`neumann`), rounds of the lower and upper level
(`parts`), rounds of all variables at once (`simultaneous`) or along tracked estimates (`tracking`), `hessian_lr="auto"`
(`curvature`).
"""

from typing import Any

from ..algorithm import Algorithm
from .aggitd import AggITD
from .fedbio import FedBiO, FedBiOAcc, FedBiOAccLocal
from .fedf2sa import FedF2SA
from .fedmbo import FedMBO
from .fedmsa import FedMSA
from .fednest import FedNest, FedNestSGD
from .lfednest import LFedNest, LFedNestSVRG
from .localbsg import AdaFBiO, LocalBSGM, LocalBSGVRM
from .lockstep import Lockstep
from .simfbo import MemFBO, ShroFBO, SimFBO

ALGORITHMS = {
    "aggitd": AggITD,
    "fednest": FedNest,
    "fednest-sgd": FedNestSGD,
    "lfednest": LFedNest,
    "lfednest-svrg": LFedNestSVRG,
    "lockstep": Lockstep,
    "fedmbo": FedMBO,
    "simfbo": SimFBO,
    "shrofbo": ShroFBO,
    "memfbo": MemFBO,
    "fedbio": FedBiO,
    "fedbioacc": FedBiOAcc,
    "fedbioacc-local": FedBiOAccLocal,
    "fedmsa": FedMSA,
    "localbsgm": LocalBSGM,
    "localbsgvrm": LocalBSGVRM,
    "adafbio": AdaFBiO,
    "fedf2sa": FedF2SA,
}

# whose hypergradient is made of the clients' own Hessians, and biased where clients differ
BIASED = frozenset({"lfednest", "lfednest-svrg", "localbsgm", "localbsgvrm", "adafbio"})
FIRST_ORDER = frozenset({"memfbo", "fedf2sa"})  # those that ask for no second derivative


def checked(name: str) -> tuple[Algorithm, Algorithm | None]:
    """An algorithm as the conformance suite runs it: with every option at work, and set to be exact (None if it cannot)."""
    kind: Any = ALGORITHMS[name]
    fields = kind.__dataclass_fields__
    busy: dict[str, Any] = {"local_steps": 2, "outer_steps": 2, "batch_size": 2, "inner_lr": 0.05, "outer_lr": 0.05}
    busy |= {"inner_rounds": 2, "hessian_lr": 0.1, "outer_optimizer": "adam:0.05"}
    if kind in (SimFBO, ShroFBO, MemFBO):
        busy |= {"client_steps": (1, 2, 3, 1, 2, 3, 1, 2), "radius": 3.0}
    busy = {field: value for field, value in busy.items() if field in fields}
    exact: dict[str, Any] = {
        "local_steps": 1,
        "inner_lr": 0.15,
        "hessian_lr": 0.15,
        "outer_lr": 0.05,
        "truncation": "full",
    }
    if kind in (FedNest, FedNestSGD):
        return kind(**busy), kind(**exact, inner_rounds=600, neumann_terms=600)
    if kind is AggITD:
        return kind(**busy), kind(**exact, inner_rounds=600)
    return kind(**busy), None  # FedMBO's estimator is random, FedF2SA's off by a penalty; the others have none


__all__ = [
    "ALGORITHMS", "BIASED", "FIRST_ORDER", "AdaFBiO", "AggITD", "FedBiO", "FedBiOAcc", "FedBiOAccLocal", "FedF2SA",
    "FedMBO", "FedMSA", "FedNest", "FedNestSGD", "LFedNest", "LFedNestSVRG", "LocalBSGM", "LocalBSGVRM", "Lockstep",
    "MemFBO", "ShroFBO", "SimFBO", "checked",
]  # fmt: skip
