"""The runs of a plan: a finished one is kept, another study's folder is refused."""

import dataclasses

import pytest

import fedbilevel as fb
from fedbilevel_studies.tuning import plan, runs, search
from fedbilevel_studies.tuning.contenders import Contender
from fedbilevel_studies.tuning.grounds import GROUNDS
from fedbilevel_studies.tuning.purse import Point

SPENT = []


def spending(purse, length, seed):
    SPENT.append((length, seed))
    purse.rounds, purse.bytes = 7, 70
    purse.trail.append(Point(5, 50, purse.task.x))


PLAN = plan.Plan((GROUNDS["bank"],), (Contender("one", spending, (10, 30)),), (0, 1), budget=20)


@pytest.fixture(autouse=True)
def _cheap(monkeypatch):
    SPENT.clear()
    monkeypatch.setattr(runs, "judge", lambda ground, seed, data_dir: lambda x: (1.0 + seed, 2.0))


def test_an_interrupted_study_goes_on(tmp_path, monkeypatch):
    said = []
    whole = runs.run(PLAN, tmp_path / "a", None, said.append)
    assert SPENT == [(10, 0), (30, 0), (10, 1), (30, 1)] and len(said) == 4
    ends = whole.groupby(["length", "seed"]).last()
    assert (ends["rounds"] == 7).all() and (ends["bytes"] == 70).all()
    assert ends["phi"].tolist() == [1.0, 2.0, 1.0, 2.0]
    (tmp_path / "a" / "runs" / "bank" / "one-30-1.csv").unlink()
    SPENT.clear()
    again = runs.run(PLAN, tmp_path / "a", None, said.append)
    assert SPENT == [(30, 1)] and again.equals(whole)
    other = dataclasses.replace(PLAN, budget=21)
    with pytest.raises(fb.InputError, match="holds another study"):
        runs.run(other, tmp_path / "a", None, said.append)


def test_without_optuna_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "has_optuna", lambda: False)
    said = []
    needs = Contender("TPE", spending, optuna=True)
    both = dataclasses.replace(PLAN, contenders=(*PLAN.contenders, needs), seeds=(0,))
    frame = runs.run(both, tmp_path, None, said.append)
    assert set(frame["contender"]) == {"one"}
    assert said[0] == search.INSTALL and "pip install" in said[0]
