"""The studies that compare the whole family of algorithms, and their summary: `fedbilevel reproduce family`.

Regularisation tuning with all clients and all rows; hyper-representation on MNIST and loss tuning on imbalanced digits with
cohorts and minibatches (ridge tuning is theory's `stationarity`). On each task every algorithm has the same local work
(local steps, rows of a minibatch) and the same grid: its step of y, of v (in regularisation tuning; one value for all on the
other tasks), and how far x may move an iteration, that is outer_lr times the steps of x that the algorithm takes in one. The
grid goes on from the best point until none of its neighbours is better, and a second look on other seeds chooses among the
best few. What is peculiar to an algorithm is tried at two values at most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from fedbilevel.tasks import Options

from .kinds import Setting
from .study import Contender, Study

GRID_SEEDS, BEYOND = (10,), 6
_GENTLE = ("lfednest", "lfednest-svrg", "fedmbo", "localbsgm", "localbsgvrm", "adafbio")
QUICK = (  # who takes part in the quick form
    "AggITD, one round a turn (ours)", "Lockstep (ours)", "FedNest, full", "SimFBO", "FedMSA", "LocalBSGM", "FedF2SA",
)  # fmt: skip
LOCAL = "FedBiOAccLocal (own lower levels)"

Settings = Mapping[str, Setting]
Variants = tuple[Settings, ...]


@dataclasses.dataclass(frozen=True)
class Work:
    """What is equal for all on one task.

    Attributes:
        turns: the values of T = N that are tried.
        local, outer, batch: local lower steps, local upper steps of those that have them apart, rows of a minibatch.
        moves: outer_lr times the steps of x of an iteration.
        gentle: the same for those that follow the clients' own hypergradients or single clients' factors, where they blow up
            at all of `moves`; None: `moves`.
        own_terms: the terms of a client's own series, of those that have one for every local step.
        forget, penalty, server: the values tried of STORM's and momentum's memory, FedF2SA's penalty, SimFBO's server step.
        rounds: of the runs of those whose iteration is a round or two, where fewer are enough; None: the study's.
    """

    turns: tuple[int, ...]
    local: int
    outer: int
    batch: int | None
    moves: tuple[float, ...]
    gentle: tuple[float, ...] | None = None
    own_terms: int = 5
    forget: tuple[float, ...] = (0.1, 0.5)
    penalty: tuple[float, ...] = (10.0, 100.0)
    server: tuple[float, ...] = (1.0, 2.0)
    rounds: int | None = None


def everybody(work: Work) -> tuple[Contender, ...]:
    """All algorithms on one task; of ShroFBO, SimFBO stands for it: with equal local steps the two are one."""
    local: dict[str, Setting] = {"local_steps": work.local, "batch_size": work.batch}
    full: dict[str, Setting] = {"truncation": "full"}
    alone: Variants = ({},)

    def one(
        label: str,
        algorithm: str,
        steps: int,
        settings: Settings,
        variants: Variants = alone,
        rounds: int | None = None,
    ) -> Contender:
        moves = work.gentle if work.gentle and algorithm in _GENTLE else work.moves
        grid = {"outer_lr": tuple(move / steps for move in moves)}
        return Contender(label, algorithm, {**local, **settings}, variants=variants, rounds=rounds, grid=grid)

    def loops(label: str, algorithm: str, settings: Settings) -> Contender:
        names = ("inner_rounds",) if algorithm == "aggitd" else ("inner_rounds", "neumann_terms")
        turns: Variants = tuple(dict.fromkeys(names, turns) for turns in work.turns)
        return one(label, algorithm, work.outer, {"outer_steps": work.outer, **settings}, turns)

    def together(label: str, algorithm: str, settings: Settings | None = None, variants: Variants = alone) -> Contender:
        return one(label, algorithm, work.local, settings or {}, variants, work.rounds)

    chains = tuple({"inner_rounds": turns, "neumann_terms": turns} for turns in work.turns)
    penalties = tuple({"inner_rounds": turns, "penalty": value} for turns in work.turns for value in work.penalty)
    memory = tuple({"forget": value} for value in work.forget)
    servers = tuple({"server_lr": value} for value in work.server)
    own = {"neumann_terms": work.own_terms, **full}
    return (
        loops("AggITD, uniform", "aggitd", {}),
        loops("AggITD, full", "aggitd", full),
        loops("AggITD, one round a turn (ours)", "aggitd", full | {"one_round": True}),
        one("Lockstep (ours)", "lockstep", work.outer, {"outer_steps": work.outer}, rounds=work.rounds),
        loops("FedNest, uniform", "fednest", {}),
        loops("FedNest, full", "fednest", full),
        loops("FedNest-SGD", "fednest-sgd", full),
        loops("LFedNest", "lfednest", full),
        loops("LFedNest-SVRG", "lfednest-svrg", full),
        one("FedMBO, 4 chains", "fedmbo", 1, {}, chains),
        together("SimFBO", "simfbo", variants=servers),
        together("MemFBO", "memfbo"),
        together("FedBiO", "fedbio"),
        together("FedBiOAcc", "fedbioacc", variants=memory),
        together("FedMSA", "fedmsa", variants=memory),
        together("LocalBSGM", "localbsgm", own, memory),
        together("LocalBSGVRM", "localbsgvrm", own, memory),
        together("AdaFBiO", "adafbio", own | {"damping": 1.0}, memory),
        one("FedF2SA", "fedf2sa", 1, {}, penalties),
        together(LOCAL, "fedbioacc-local", {"share_lower": True}, memory),
    )


MNIST = Study(
    "family-hyper-representation",
    "All algorithms: hyper-representation on MNIST, non-iid, 10 of 100 clients, minibatches",
    "hyper-representation", Options(dataset="mnist", partition="shards", clients=100), 10,
    everybody(
        Work(
            (1, 5), 5, 2, 64, (0.125, 0.25, 0.5, 1.0), gentle=(0.008, 0.03, 0.125), own_terms=1, forget=(0.5,),
            penalty=(1.0, 10.0), rounds=240,
        )
    ),
    {"inner_lr": (0.03, 0.06), "hessian_lr": (0.02,)},
    grid_rounds=150, grid_seeds=GRID_SEEDS, beyond=BEYOND, shortlist=4, shortlist_seeds=(11,), rounds=480, seeds=(0, 1, 2),
    levels=(0.80, 0.85, 0.88, 0.90, 0.93), goal=0.90, shares=0,
)  # fmt: skip

REGULARISATION = Study(
    "family-regularisation",
    "All algorithms: regularisation tuning on breast-cancer, non-iid, all 10 clients, all rows",
    "regularisation", Options(dataset="breast-cancer", partition="dirichlet", clients=10), None,
    everybody(Work((1, 5), 5, 5, None, (5.0, 15.0, 50.0, 150.0))),
    {"inner_lr": (0.1, 0.3), "hessian_lr": (0.1, 0.3)},
    grid_rounds=200, grid_seeds=GRID_SEEDS, beyond=BEYOND, shortlist=16, shortlist_seeds=tuple(range(11, 21)), rounds=400,
    seeds=(0, 1, 2, 3, 4), metric="validation_loss", levels=(0.15, 0.12, 0.10, 0.08, 0.07), goal=0.10, shares=0,
)  # fmt: skip

LOSS_TUNING = Study(
    "family-loss-tuning",
    "All algorithms: loss tuning on imbalanced digits, non-iid, 5 of 20 clients, minibatches",
    "loss-tuning", Options(dataset="digits", partition="shards", clients=20), 5,
    everybody(Work((1, 5), 5, 1, 16, (0.3, 1.0, 3.0, 10.0), own_terms=1)),
    {"inner_lr": (0.03, 0.1, 0.3, 1.0), "hessian_lr": (0.03,)},
    grid_rounds=300, grid_seeds=GRID_SEEDS, beyond=BEYOND, shortlist=4, shortlist_seeds=(11,), rounds=600,
    seeds=(0, 1, 2, 3, 4), metric="balanced_accuracy", levels=(0.80, 0.85, 0.90), goal=0.90, shares=0,
)  # fmt: skip

PARTS = (REGULARISATION, MNIST, LOSS_TUNING)
