"""The algorithms that ship with the library, a line each, in the order of `fedbilevel list`.

A line here and the algorithm's own file are all that it takes: what is to be known of it stands in its class (`About`), and
`fb.NAME`, the command line, the conformance suite, tables and pages are made from that.
"""

# isort: off
from .aggitd import AggITD as AggITD
from .fednest import FedNest as FedNest
from .fednest_sgd import FedNestSGD as FedNestSGD
from .lfednest import LFedNest as LFedNest
from .lfednest_svrg import LFedNestSVRG as LFedNestSVRG
from .lockstep import Lockstep as Lockstep
from .fedmbo import FedMBO as FedMBO
from .simfbo import SimFBO as SimFBO
from .shrofbo import ShroFBO as ShroFBO
from .memfbo import MemFBO as MemFBO
from .fedbio import FedBiO as FedBiO
from .fedbioacc import FedBiOAcc as FedBiOAcc
from .fedbioacc_local import FedBiOAccLocal as FedBiOAccLocal
from .fedmsa import FedMSA as FedMSA
from .localbsgm import LocalBSGM as LocalBSGM
from .localbsgvrm import LocalBSGVRM as LocalBSGVRM
from .adafbio import AdaFBiO as AdaFBiO
from .fedf2sa import FedF2SA as FedF2SA
