"""A study's run: the grid, then the seeds; each finished part is kept, and an interrupted study goes on."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

from fedbilevel import Algorithm, Diverged
from fedbilevel.errors import check
from fedbilevel.memory import release
from fedbilevel.results import keep

from .kinds import JSON, DataDir
from .oracles import oracle_calls
from .search import Chosen, Telling, search, write_settings
from .shares import Shares, estimates
from .study import Contender, Study


def run(study: Study, folder: Path, data_dir: DataDir = None, best: Chosen | None = None) -> None:
    """Stages 1 and 2.

    Args:
        folder: of the study; what is there already is kept, if it is of the same study.
        data_dir: folder of data sets that are not embedded.
        best: label -> what the grid chose, to leave it out.

    Raises:
        InputError: the folder holds another study or runs with other step sizes, or a data set is missing.
    """
    study.build(study.contenders[0], study.seeds[0], data_dir)  # a missing data set leaves no folder behind
    open_folder(folder, study.to_dict())
    asked = {"study": study.name, "clients_an_exchange": study.clients_an_exchange}  # what `fedbilevel cost` needs
    (folder / "config.json").write_text(json.dumps(asked) + "\n")
    say = lambda news: print(f"{study.name}: {news}", flush=True)
    if best is None:
        best = search(study, folder, data_dir, say)
    else:
        check(set(best) >= {c.label for c in study.contenders}, f"no settings are checked in for all of {study.name}.")
    same_settings(folder, best)
    write_settings(folder / "settings.toml", best)
    for seed in study.seeds:
        for contender in study.contenders:
            _final(study, contender, contender.build(best[contender.label]), seed, folder, data_dir, say)


def open_folder(folder: Path, plain: Mapping[str, JSON]) -> None:
    """Make the folder, or go on in one of the very same study."""
    same_study(folder, plain)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(plain, indent=2) + "\n")


def same_study(folder: Path, plain: Mapping[str, JSON]) -> None:
    """Refuse a folder of anything else."""
    file = folder / "study.json"
    if folder.exists() and any(folder.iterdir()):
        check(file.is_file(), f"{folder} is not empty and holds no study: name another folder.")
        same = json.loads(file.read_text()) == plain
        check(same, f"{folder} holds another study, or another version of it: name another folder, or remove this one.")


def same_settings(folder: Path, best: Chosen) -> None:
    """Refuse to mix runs of these step sizes with finished ones of others."""
    file = folder / "settings.toml"
    if not file.is_file() or not any(folder.glob("runs/*/done.json")):
        return
    for label, before in tomllib.loads(file.read_text()).items():
        check(
            label not in best or dict(best[label]) == before,
            f"{folder} holds runs of {label} with other step sizes ({before}): name another folder, or remove this one.",
        )


def _final(
    study: Study, contender: Contender, algorithm: Algorithm, seed: int, folder: Path, data_dir: DataDir, say: Telling
) -> None:
    place = folder / "runs" / f"{contender.label}-{seed}"
    if (place / "done.json").is_file():
        return
    task, engine = study.build(contender, seed, data_dir)
    share = study.shares and contender.kind == "rival" and seed == study.seeds[0] and estimates(algorithm)
    beside = [Shares(place / "shares.csv", task, engine, contender.label, seed, study.shares)] if share else []
    run = task.describe(
        algorithm, rounds=contender.rounds or study.rounds, engine=engine, evaluate_every=study.every, check=False,
        name=f"{study.name}: {contender.label}, seed {seed}",
    )  # fmt: skip
    failure = None
    try:
        columns = {"algorithm": contender.label, "seed": seed}
        result = keep(run, place, resume=True, columns=columns, callbacks=beside)
    except Diverged as error:
        failure, result = str(error), error.result
    per_iteration = None if result is None else result.protocol.rounds
    end = {} if result is None else {k: v for k, v in result.history[-1].items() if k == study.metric}
    say(f"{contender.label}, seed {seed}: {failure or ', '.join(f'{k} {v:.4f}' for k, v in end.items())}")
    done = {
        "oracle_calls": _calls(folder, study, contender, algorithm),
        "rounds_per_iteration": per_iteration,
        "failure": failure,
        "kind": contender.kind,
    }
    (place / "done.json").write_text(json.dumps(done) + "\n")
    (place / "checkpoint.eqx").unlink(missing_ok=True)
    release()


def _calls(folder: Path, study: Study, contender: Contender, algorithm: Algorithm) -> float:
    """Oracle calls of one iteration; counted once for each contender."""
    file = folder / "oracles.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    if contender.label not in known:
        known[contender.label] = oracle_calls(algorithm, *study.sizes(contender))
        file.write_text(json.dumps(known, indent=2) + "\n")
    return known[contender.label]["all"]
