"""A small study, for tests of what studies are made of."""

from fedbilevel.tasks import Options
from fedbilevel_studies import study

SMALL = study.Study(
    "small", "A small study", "ridge", Options(dataset="diabetes", clients=4), None,
    (
        study.Contender("AggITD, full", "aggitd", {"inner_rounds": 2, "truncation": "full"}),
        study.Contender(
            "FedNest", "fednest", {"inner_rounds": 2, "truncation": "full"},
            variants=({"neumann_terms": 1}, {"neumann_terms": 2}),
        ),
        study.Contender("still", "aggitd", {"inner_rounds": 2, "truncation": "full"}, "frozen"),
        study.Contender("pooled", "aggitd", {"inner_rounds": 2, "truncation": "full"}, "pooled"),
    ),
    {"inner_lr": (0.01, 0.1), "hessian_lr": (0.05,), "outer_lr": (0.1, 1.0)},
    grid_rounds=30, grid_seeds=(10,), rounds=60, seeds=(0, 1), metric="test_error", levels=(0.8, 0.6), goal=0.7,
    pairs=(("AggITD, full", "FedNest"),), shares=3, shortlist=2, shortlist_seeds=(11,),
)  # fmt: skip
