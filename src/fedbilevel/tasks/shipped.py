"""The tasks that ship with the library, a line each, in the order of `fedbilevel list`; a `Kind` says what each is."""

# isort: off
from .quadratic import quadratic as quadratic
from .ridge import ridge as ridge
from .minimax import minimax as minimax
from .compositional import compositional as compositional
from .regularisation import regularisation as regularisation
from .hyper_representation import hyper_representation as hyper_representation
from .loss_tuning import loss_tuning as loss_tuning
from .bank import bank as bank
from .scaled import scaled as scaled
from .hearts import hearts as hearts
from .cleaning import cleaning as cleaning
from .fair import fair as fair
from .fair import fair_age as fair_age
from .personal import personal as personal
from .client_weights import client_weights as client_weights
