"""The library's store of best known settings is what the studies found, where it says so."""

import pytest

from fedbilevel.settings import best
from fedbilevel_studies import catalogue

TAKEN = {
    "aggitd": "AggITD, one round a turn (ours)", "lockstep": "Lockstep (ours)", "fednest": "FedNest, full",
    "fednest-sgd": "FedNest-SGD", "lfednest": "LFedNest", "lfednest-svrg": "LFedNest-SVRG",
}  # fmt: skip


@pytest.mark.parametrize("name", ["mnist-non-iid", "fashion-mnist-non-iid", "loss-tuning-non-iid"])
def test_the_store_holds_what_the_grids_chose(name):
    study, found = catalogue.STUDIES[name], catalogue.found(name)
    for algorithm, label in TAKEN.items():
        contender = next(each for each in study.contenders if each.label == label)
        dataset = str(study.options.dataset)
        assert best(study.task, dataset, algorithm) == {**contender.settings, **found[label]}
