"""The algorithms, one file each, and their names on the command line."""

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

__all__ = ["ALGORITHMS", "AggITD", "FedNest", "FedNestSGD", "LFedNest", "LFedNestSVRG"]
