"""The studies that `fedbilevel reproduce` knows, by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..tasks import Options
from .study import Contender, Study

SEEDS, GRID_SEEDS = (0, 1, 2, 3, 4), (10,)

# Step sizes, equal for every contender of a study
WIDE = {"inner_lr": (0.01, 0.03, 0.1), "hessian_lr": (0.01, 0.03), "outer_lr": (0.03, 0.1, 0.3)}


def equal(rounds: int, local: int, outer: int, batch: int | None) -> dict[str, Any]:
    """T = N and the same local work for everybody."""
    return {"inner_rounds": rounds, "local_steps": local, "outer_steps": outer, "batch_size": batch}


def rivals(rounds: int, local: int, outer: int, batch: int | None) -> tuple[Contender, ...]:
    """AggITD and FedNest, both truncations of each, at T = N = `rounds`."""
    work = equal(rounds, local, outer, batch)
    series = work | {"neumann_terms": rounds}
    return (
        Contender("AggITD, uniform", "aggitd", work),
        Contender("AggITD, full", "aggitd", work | {"truncation": "full"}),
        Contender("FedNest, uniform", "fednest", series),
        Contender("FedNest, full", "fednest", series | {"truncation": "full"}),
    )


def family(rounds: int, local: int, outer: int, batch: int | None) -> tuple[Contender, ...]:
    """All of the first issue's algorithms, FedNest with one local step too."""
    series = equal(rounds, local, outer, batch) | {"neumann_terms": rounds}
    return (
        *rivals(rounds, local, outer, batch),
        Contender("FedNest, tau = 1", "fednest", series | {"local_steps": 1, "outer_steps": 1, "truncation": "full"}),
        Contender("FedNest-SGD", "fednest-sgd", series | {"truncation": "full"}),
        Contender("LFedNest", "lfednest", series | {"truncation": "full"}),
        Contender("LFedNest-SVRG", "lfednest-svrg", series | {"truncation": "full"}),
    )


def _images(dataset: str, partition: str) -> Study:
    short = "iid" if partition == "iid" else "non-iid"
    free = {"inner_rounds": 1, "local_steps": 10, "outer_steps": 2, "batch_size": 128, "truncation": "full"}
    return Study(
        f"{dataset}-{short}",
        f"Hyper-representation on {dataset}, {short}, 10 of 100 clients; T = N = 5, equal local work and grid",
        "hyper-representation", Options(dataset=dataset, partition=partition, clients=100), 10,
        (
            *family(5, 5, 2, 64),
            Contender("AggITD, N = 1", "aggitd", free),
            Contender("AggITD, N = 1, one round a turn", "aggitd", free | {"one_round": True}),
        ),
        {"inner_lr": (0.01, 0.03, 0.1), "hessian_lr": (0.01,), "outer_lr": (0.015, 0.05, 0.15, 0.25)},
        grid_rounds=260, grid_seeds=GRID_SEEDS, rounds=500, seeds=SEEDS[:3], every=1,
    )  # fmt: skip


def _equal(rounds: int) -> Study:
    return Study(
        f"equal-n{rounds}",
        f"AggITD against FedNest on MNIST hyper-representation, non-iid, 10 of 100 clients, T = N = {rounds}",
        "hyper-representation", Options(dataset="mnist", partition="shards", clients=100), 10,
        rivals(rounds, 5, 2, 64),
        {"inner_lr": (0.03, 0.1), "hessian_lr": (0.01, 0.03), "outer_lr": (0.015, 0.05)},
        grid_rounds=18 * 25 if rounds == 5 else 33 * 16, grid_seeds=GRID_SEEDS,
        rounds=18 * 45 if rounds == 5 else 33 * 30, seeds=SEEDS, levels=(0.80, 0.85, 0.88, 0.90), goal=0.88,
        pairs=tuple((f"AggITD, {a}", f"FedNest, {b}") for b in ("full", "uniform") for a in ("full", "uniform")),
    )  # fmt: skip


def _loss_tuning(partition: str) -> Study:
    short = "iid" if partition == "iid" else "non-iid"
    work = {"inner_rounds": 1, "local_steps": 10, "outer_steps": 1, "batch_size": 64}
    series = work | {"neumann_terms": 1}
    return Study(
        f"loss-tuning-{short}",
        f"Loss tuning on imbalanced MNIST, {short}, 10 of 100 clients",
        "loss-tuning", Options(dataset="mnist", partition=partition, clients=100), 10,
        (
            Contender("AggITD, uniform", "aggitd", work),
            Contender("AggITD, full", "aggitd", work | {"truncation": "full"}),
            Contender("AggITD, one round a turn", "aggitd", work | {"truncation": "full", "one_round": True}),
            Contender("FedNest, full", "fednest", series | {"truncation": "full"}),
            Contender("FedNest-SGD", "fednest-sgd", series | {"truncation": "full"}),
            Contender("LFedNest", "lfednest", series | {"truncation": "full"}),
            Contender("LFedNest-SVRG", "lfednest-svrg", series | {"truncation": "full"}),
            Contender("no loss tuning", "aggitd", work | {"truncation": "full", "one_round": True}, "frozen"),
            Contender("pooled", "aggitd", work | {"truncation": "full"}, "pooled"),
        ),
        {"inner_lr": (0.01, 0.03), "hessian_lr": (0.03,), "outer_lr": (1.0, 6.0)},
        grid_rounds=400, grid_seeds=GRID_SEEDS, rounds=1500, seeds=SEEDS[:3], metric="balanced_accuracy", goal=0.85,
        pairs=(("AggITD, full", "FedNest, full"), ("AggITD, uniform", "FedNest, full")), shares=0, every=5,
    )  # fmt: skip


def _regularisation(dataset: str, clients: int, cohort: int | None) -> Study:
    return Study(
        f"regularisation-{dataset}",
        f"Regularisation tuning on {dataset}, non-iid, {cohort or clients} of {clients} clients; T = N = 5",
        "regularisation", Options(dataset=dataset, partition="dirichlet", clients=clients), cohort,
        family(5, 5, 5, None if dataset == "breast-cancer" else 64),
        {"inner_lr": (0.03, 0.1, 0.3), "hessian_lr": (0.03, 0.1), "outer_lr": (0.3, 1.0, 3.0)},
        grid_rounds=200, grid_seeds=GRID_SEEDS, rounds=400, seeds=SEEDS, metric="validation_loss",
        levels=(0.25, 0.2, 0.15, 0.12) if dataset == "breast-cancer" else (0.5, 0.4, 0.35, 0.32),
        goal=0.15 if dataset == "breast-cancer" else 0.35,
        pairs=(("AggITD, full", "FedNest, full"), ("AggITD, uniform", "FedNest, full")),
    )  # fmt: skip


STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        _images("mnist", "shards"), _images("mnist", "iid"), _images("fashion-mnist", "shards"),
        _images("fashion-mnist", "iid"), _equal(5), _equal(10), _regularisation("breast-cancer", 10, None),
        _regularisation("mnist", 100, 10), _loss_tuning("shards"), _loss_tuning("iid"),
    )
}  # fmt: skip


def quick(study: Study) -> Study:
    """The same study in minutes: embedded data, few clients, two values of each step size, two seeds."""
    small = dataclasses.replace(study.options, dataset=_EMBEDDED.get(str(study.options.dataset), study.options.dataset))
    small = dataclasses.replace(small, clients=min(20, small.clients or 20))
    grid = {name: values[-2:] for name, values in study.grid.items()}
    batch = lambda settings: {
        name: (16 if name == "batch_size" and value else value) for name, value in settings.items()
    }
    contenders = tuple(dataclasses.replace(c, settings=batch(c.settings)) for c in study.contenders)
    return dataclasses.replace(
        study, summary=f"{study.summary} (quick: {small.dataset}, {small.clients} clients)", options=small,
        cohort=study.cohort and 5, contenders=contenders, grid=grid, grid_rounds=min(study.grid_rounds, 150),
        rounds=min(study.rounds, 250), seeds=study.seeds[:2], shares=study.shares and 5,
    )  # fmt: skip


_EMBEDDED = {"mnist": "digits", "fashion-mnist": "digits"}


def names() -> dict[str, str]:
    """Every study and theory's, with a line about it."""
    from .theory import THEORY

    return {name: study.summary for name, study in STUDIES.items()} | {
        name: about for name, (about, _) in THEORY.items()
    }


def reproduce(name: str, folder: Path, *, small: bool, data_dir: Any, checked_in: bool) -> list[Path]:
    """Run one study to its tables and figures; returns the files.

    Raises:
        InputError: an unknown name, a folder of another study, or a data set that is missing.
    """
    from ..errors import check, unknown_name
    from . import study as stages
    from . import tables
    from .theory import THEORY

    if name in THEORY:
        return THEORY[name][1](folder, small, lambda news: print(f"{name}: {news}", flush=True))
    if name not in STUDIES:
        raise unknown_name("study", name, names())
    study = quick(STUDIES[name]) if small else STUDIES[name]
    best = None
    if checked_in:
        check(not small, "the checked-in step sizes are of the whole studies: leave --quick or --checked-in out.")
        best = found(name)
    stages.run(study, folder, data_dir, best)
    return tables.write(study, folder)


def found(name: str) -> dict[str, dict[str, float]]:
    """The step sizes that the grid of a study found, as kept in the package."""
    import tomllib
    from importlib import resources

    from ..errors import check

    file = resources.files("fedbilevel.experiments").joinpath("found").joinpath(f"{name}.toml")
    check(file.is_file(), f"no step sizes are checked in for {name}: leave --checked-in out, and the grid finds them.")
    return tomllib.loads(file.read_text())
