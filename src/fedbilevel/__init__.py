"""Federated bilevel optimisation: algorithms written once, checked against closed forms, run anywhere.

`import fedbilevel as fb`, then `fb.Problem`, `fb.FederatedData`, an algorithm such as `fb.AggITD`, and `fb.solve`.
"""

from typing import TYPE_CHECKING

from .errors import ClientError, Diverged, InputError, RunError
from .lazy import loading as _loading
from .moved import install as _install
from .version import __version__

if TYPE_CHECKING:  # what is offered beside these; each is loaded when it is first asked for
    from . import (
        algorithms,
        callbacks,
        datasets,
        engines,
        errors,
        partition,
        processes,
        reference,
        results,
        tasks,
        testing,
    )
    from .algorithm import Algorithm, Info, State, Truncation, count, option, rate
    from .algorithms.shipped import *  # noqa: F403  AggITD and all the others
    from .app import App
    from .by_client import ByClient
    from .client_table import ClientTable
    from .data import FederatedData
    from .description import Description
    from .engines import Faults
    from .engines.shipped import *  # noqa: F403  Simulation and the others
    from .estimator import Estimator, estimator
    from .federation import Client, Federation, Reply, When
    from .loader import load_clients
    from .metrics import validation_loss
    from .owned import KeptAtSites, PerClient, per_client
    from .problem import Problem, Rows
    from .protocol import Protocol, protocol
    from .result import History, Result, load_result
    from .solve import estimate_hypergradient, solve
    from .stepper import Standing, Stepper, stepper
    from .tables.prepare import prepare
    from .tables.prepared import Prepared, load_prepared
    from .tables.wanted import Prepare
    from .train import train
    from .tune import tune
    from .tune.tuning import Tuned
else:
    _OFFERED, __getattr__, __dir__ = _loading(__name__, __file__)
    __all__ = ["ClientError", "Diverged", "InputError", "RunError", *_OFFERED]

_install()
