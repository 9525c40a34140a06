"""The studies that `fedbilevel reproduce` knows, by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fedbilevel.tasks import Options

from . import summary
from .family import PARTS, QUICK
from .kinds import DataDir, Setting
from .study import Contender, Study

SEEDS, GRID_SEEDS = (0, 1, 2, 3, 4), (10,)

OURS, LOCKSTEP = "one round a turn (ours)", "Lockstep (ours)"
_FREE = (1, 5)  # the turns of the lower loop that a study with N free tries, for every contender alike


def equal(rounds: int, local: int, outer: int, batch: int | None) -> dict[str, Setting]:
    """T = N and the same local work for everybody."""
    return {"inner_rounds": rounds, "local_steps": local, "outer_steps": outer, "batch_size": batch}


def lockstep(local: int, outer: int, batch: int | None) -> dict[str, Setting]:
    """Lockstep with the same local work; it has no T and no N."""
    return {"local_steps": local, "outer_steps": outer, "batch_size": batch}


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
    """AggITD as it is and as we extend it, FedNest with one local step too, and FedNest's variants, at T = N = `rounds`."""
    work = equal(rounds, local, outer, batch)
    series = work | {"neumann_terms": rounds, "truncation": "full"}
    return (
        *rivals(rounds, local, outer, batch),
        Contender(f"AggITD, {OURS}", "aggitd", work | {"truncation": "full", "one_round": True}),
        Contender(LOCKSTEP, "lockstep", lockstep(local, outer, batch), rounds=250),
        Contender("FedNest, tau = 1", "fednest", series | {"local_steps": 1, "outer_steps": 1}),
        Contender("FedNest-SGD", "fednest-sgd", series),
        Contender("LFedNest", "lfednest", series),
        Contender("LFedNest-SVRG", "lfednest-svrg", series),
    )


def turns_free(contenders: tuple[Contender, ...]) -> tuple[Contender, ...]:
    """The same with T = N left to the grid."""
    names = ("inner_rounds", "neumann_terms")

    def free(contender: Contender) -> Contender:
        mine = [name for name in names if name in contender.settings]
        fixed = {name: value for name, value in contender.settings.items() if name not in mine}
        variants = tuple(dict.fromkeys(mine, N) for N in _FREE) if mine else ({},)
        return dataclasses.replace(contender, settings=fixed, variants=variants)

    return tuple(map(free, contenders))


def extensions(local: int, outer: int, batch: int | None) -> tuple[Contender, ...]:
    """AggITD with one turn, and what each of our options makes of it."""
    work = equal(1, local, outer, batch)
    full = work | {"truncation": "full"}
    return (
        Contender("uniform (the paper's)", "aggitd", work),
        Contender("full", "aggitd", full),
        Contender("full, warm v", "aggitd", full | {"warm_start_v": True}),
        Contender("full, independent cohorts", "aggitd", full | {"independent_cohorts": True}),
        Contender("full, one round", "aggitd", full | {"one_round": True}),
        Contender("full, one round, warm v", "aggitd", full | {"one_round": True, "warm_start_v": True}),
        Contender("full, one round, auto step", "aggitd", full | {"one_round": True, "hessian_lr": "auto"}),
        Contender(LOCKSTEP, "lockstep", lockstep(local, outer, batch), rounds=300),
    )


_FIVE, _TEN = (5, 2, 64), (10, 2, 64)  # local lower steps, local upper steps, rows of a minibatch
_MNIST = Options(dataset="mnist", partition="shards", clients=100)
_SOONER = tuple((one, "FedNest, full") for one in ("AggITD, full", "AggITD, uniform", f"AggITD, {OURS}", LOCKSTEP))


def _images(dataset: str, partition: str) -> Study:
    """MNIST, non-iid, is the study that others lean on: there one turn was the best of 1 and 5 for every contender."""
    main = (dataset, partition) == ("mnist", "shards")
    short, turns = "iid" if partition == "iid" else "non-iid", "T = N free" if main else "T = N = 1"
    levels = (0.80, 0.85, 0.88, 0.90, 0.93) if dataset == "mnist" else (0.70, 0.75, 0.80, 0.82)
    chosen_twice = partition == "shards"  # with two classes a client the soonest points blow up later; iid they do not
    contenders = family(1, *_TEN)
    return Study(
        f"{dataset}-{short}",
        f"Hyper-representation on {dataset}, {short}, 10 of 100 clients; equal local work and grid, {turns}",
        "hyper-representation", Options(dataset=dataset, partition=partition, clients=100), 10,
        turns_free(contenders) if main else contenders,
        {"inner_lr": (0.01, 0.03, 0.06), "hessian_lr": (0.01,), "outer_lr": (0.06, 0.12, 0.25, 0.5)[: 4 if main else 3]},
        grid_rounds=200 if main else 130, grid_seeds=GRID_SEEDS, shortlist=4 if chosen_twice else 1,
        shortlist_seeds=(11,) if chosen_twice else (), rounds=500 if main else 300, seeds=SEEDS if main else SEEDS[:3],
        levels=levels, goal=levels[3] if main else levels[2], pairs=_SOONER, every=1,
    )  # fmt: skip


def _equal(rounds: int) -> Study:
    return Study(  # at N = 10 the grid alone chooses stable steps; at 5 it does not
        f"equal-n{rounds}",
        f"AggITD against FedNest on MNIST hyper-representation, non-iid, 10 of 100 clients, T = N = {rounds}",
        "hyper-representation", _MNIST, 10, rivals(rounds, *_FIVE),
        {"inner_lr": (0.03, 0.1, 0.3), "hessian_lr": (0.01, 0.03), "outer_lr": (0.05, 0.15)},
        grid_rounds=18 * 25 if rounds == 5 else 33 * 16, grid_seeds=(*GRID_SEEDS, 11),
        shortlist=4 if rounds == 5 else 1, shortlist_seeds=(12,) if rounds == 5 else (),
        rounds=18 * 45 if rounds == 5 else 33 * 30, seeds=SEEDS, levels=(0.80, 0.85, 0.88, 0.90), goal=0.88,
        pairs=tuple((f"AggITD, {a}", f"FedNest, {b}") for b in ("full", "uniform") for a in ("full", "uniform")),
    )  # fmt: skip


def _loss_tuning(partition: str) -> Study:
    short = "iid" if partition == "iid" else "non-iid"
    work = equal(1, 10, 1, 64)
    series = work | {"neumann_terms": 1, "truncation": "full"}
    return Study(
        f"loss-tuning-{short}",
        f"Loss tuning on imbalanced MNIST, {short}, 10 of 100 clients; T = N = 1",
        "loss-tuning", Options(dataset="mnist", partition=partition, clients=100), 10,
        (
            Contender("AggITD, uniform", "aggitd", work),
            Contender("AggITD, full", "aggitd", work | {"truncation": "full"}),
            Contender(f"AggITD, {OURS}", "aggitd", work | {"truncation": "full", "one_round": True}),
            Contender(LOCKSTEP, "lockstep", lockstep(10, 1, 64), rounds=400),
            Contender("FedNest, full", "fednest", series),
            Contender("FedNest-SGD", "fednest-sgd", series),
            Contender("LFedNest", "lfednest", series),
            Contender("LFedNest-SVRG", "lfednest-svrg", series),
            Contender("no loss tuning", "aggitd", work | {"truncation": "full", "one_round": True}, "frozen"),
            Contender("pooled", "aggitd", work | {"truncation": "full"}, "pooled"),
        ),
        {"inner_lr": (0.01, 0.03), "hessian_lr": (0.03,), "outer_lr": (1.0, 3.0)},
        grid_rounds=400, grid_seeds=GRID_SEEDS, rounds=600 if partition == "iid" else 1200, seeds=SEEDS[:3],
        metric="balanced_accuracy",
        levels=(0.80, 0.85, 0.88, 0.90), goal=0.85, pairs=_SOONER, shares=0, every=5,
    )  # fmt: skip


def _extensions(task: str) -> Study:
    tuning = task == "loss-tuning"
    grid = {"inner_lr": (0.01, 0.03), "hessian_lr": (0.03,), "outer_lr": (1.0, 3.0)}
    if not tuning:
        grid = {"inner_lr": (0.01, 0.03, 0.06), "hessian_lr": (0.01,), "outer_lr": (0.12, 0.25, 0.5)}
    return Study(
        f"extensions-{task}",
        f"AggITD and our options of it: {task} on MNIST, non-iid, 10 of 100 clients, minibatches; N = 1",
        task, _MNIST, 10, extensions(*((10, 1, 64) if tuning else _TEN)), grid,
        grid_rounds=400 if tuning else 200, grid_seeds=GRID_SEEDS, rounds=600 if tuning else 400, seeds=SEEDS[:3],
        metric="balanced_accuracy" if tuning else "test_accuracy", levels=(0.80, 0.85, 0.88, 0.90),
        goal=0.85 if tuning else 0.90, shares=0, every=5 if tuning else 1,
    )  # fmt: skip


def _regularisation(dataset: str, clients: int, cohort: int | None) -> Study:
    """On raw pixels the curvature of the inner loss is about 50, so that steps are smaller than on standardised columns."""
    pixels = dataset == "mnist"
    inner, outer = ((0.01, 0.03), (10.0, 30.0, 100.0, 300.0)) if pixels else ((0.1, 0.3), (1.0, 3.0, 10.0, 30.0))
    return Study(
        f"regularisation-{dataset}",
        f"Regularisation tuning on {dataset}, non-iid, {cohort or clients} of {clients} clients; T = N = 5",
        "regularisation", Options(dataset=dataset, partition="dirichlet", clients=clients), cohort,
        family(5, 5, 5, 64 if pixels else None), {"inner_lr": inner, "hessian_lr": inner, "outer_lr": outer},
        grid_rounds=200, grid_seeds=GRID_SEEDS, shortlist=3 if pixels else 6,
        shortlist_seeds=(11,) if pixels else (11, 12), rounds=400, seeds=SEEDS[:3] if pixels else SEEDS,
        metric="validation_loss", levels=(0.7, 0.6, 0.5, 0.4) if pixels else (0.15, 0.12, 0.1, 0.08),
        goal=0.6 if pixels else 0.15, pairs=_SOONER,
    )  # fmt: skip


STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        _images("mnist", "shards"), _images("mnist", "iid"), _images("fashion-mnist", "shards"),
        _images("fashion-mnist", "iid"), _equal(5), _equal(10), _regularisation("breast-cancer", 10, None),
        _regularisation("mnist", 100, 10), _loss_tuning("shards"), _loss_tuning("iid"),
        _extensions("hyper-representation"), _extensions("loss-tuning"), *PARTS,
    )
}  # fmt: skip


def quick(study: Study) -> Study:
    """The same study in minutes: embedded data, few clients, two values of each step size, one variant, two seeds.

    Of the whole family seven take part.
    """
    small = dataclasses.replace(study.options, dataset=_EMBEDDED.get(str(study.options.dataset), study.options.dataset))
    small = dataclasses.replace(small, clients=min(20, small.clients or 20))
    grid = {name: values[-2:] for name, values in study.grid.items()}
    batch = lambda settings: {
        name: (16 if name == "batch_size" and value else value) for name, value in settings.items()
    }
    whole = {part.name for part in PARTS}
    contenders = tuple(
        dataclasses.replace(
            c, settings=batch(c.settings), variants=c.variants[:1], rounds=c.rounds and min(c.rounds, 150),
            grid={name: values[-2:] for name, values in c.grid.items()},
        )
        for c in study.contenders
        if study.name not in whole or c.label in QUICK
    )  # fmt: skip
    return dataclasses.replace(
        study, summary=f"{study.summary} (quick: {small.dataset}, {small.clients} clients)", options=small,
        cohort=study.cohort and 5, contenders=contenders, grid=grid, grid_rounds=min(study.grid_rounds, 150),
        rounds=min(study.rounds, 250), seeds=study.seeds[:2], beyond=0, shortlist_seeds=(),
        shares=study.shares and 5,
    )  # fmt: skip


_EMBEDDED = {"mnist": "digits", "fashion-mnist": "digits"}


def names() -> dict[str, str]:
    """Every study and theory's, with a line about it."""
    from . import tuning
    from .theory import THEORY

    found = {name: study.summary for name, study in STUDIES.items()}
    found |= {name: about for name, (about, _) in THEORY.items()}
    found |= {tuning.NAME: tuning.SUMMARY}
    return found | {"family": "All algorithms: " + ", ".join(summary.STUDIES) + "; one table and figure of all"}


def folder_of(name: str, out: Path, several: bool) -> Path:
    """Where a study is kept, in an output folder of that study alone or of several; "family" puts its parts beside it."""
    return out / name if several and name != "family" else out


def reproduce(name: str, folder: Path, *, small: bool, data_dir: DataDir, checked_in: bool) -> list[Path]:
    """Run one study to its tables and figures; returns the files.

    Raises:
        InputError: an unknown name, a folder of another study, or a data set that is missing.
    """
    from fedbilevel import InputError
    from fedbilevel.errors import unknown_name

    from . import stages, tables, tuning
    from .theory import THEORY

    if small and checked_in:
        raise InputError("the checked-in step sizes are of the whole studies: leave --quick or --checked-in out.")
    if name == "family":
        parts = {study.name: quick(study) if small else study for study in PARTS}
        for part in parts.values():  # what can be refused is refused now, not after hours
            part.build(part.contenders[0], part.seeds[0], data_dir)
            stages.same_study(folder / part.name, part.to_dict())
            if checked_in:
                found(part.name)
        again = lambda part, place: reproduce(part, place, small=small, data_dir=data_dir, checked_in=checked_in)
        return summary.family(folder, again, parts)
    say = lambda news: print(f"{name}: {news}", flush=True)
    if name in THEORY:
        return THEORY[name][1](folder, small, say)
    if name == tuning.NAME:
        return tuning.tuning(folder, small, data_dir, say)
    if name not in STUDIES:
        raise unknown_name("study", name, names())
    study = quick(STUDIES[name]) if small else STUDIES[name]
    best = None
    if checked_in:
        best = found(name)
    stages.run(study, folder, data_dir, best)
    return tables.write(study, folder)


def found(name: str) -> dict[str, dict[str, Setting]]:
    """What the grid of a study chose, as kept in the package."""
    import tomllib
    from importlib import resources

    from fedbilevel.errors import check

    file = resources.files("fedbilevel_studies").joinpath("found").joinpath(f"{name}.toml")
    check(file.is_file(), f"no step sizes are checked in for {name}: leave --checked-in out, and the grid finds them.")
    return tomllib.loads(file.read_text())
