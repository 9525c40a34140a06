"""The studies of the whole family: who is in them, and their summary."""

import numpy as np
import pandas
import pytest

from fedbilevel import solve
from fedbilevel.algorithms import ALGORITHMS
from fedbilevel.errors import InputError
from fedbilevel.tasks import TASKS
from fedbilevel_studies import catalogue, family, summary, tables
from helpers.plain import plain


def test_the_family_s_studies_leave_nobody_out_and_let_x_move_as_far():
    for each in family.PARTS:
        assert {c.algorithm for c in each.contenders} == set(ALGORITHMS) - {"shrofbo"}  # which is simfbo there
        work = {}
        for contender in each.contenders:
            one = contender.build(each.candidates(contender)[0])
            # FedF2SA and FedMBO step once, those with a round of their own for x `outer_steps` times, else x moves with y
            apart = contender.algorithm in ("fedf2sa", "fedmbo")
            steps = 1 if apart else getattr(one, "outer_steps", one.local_steps)
            work[contender.label] = [round(rate * steps, 9) for rate in each.rates(contender)["outer_lr"]]
            assert (one.local_steps, one.batch_size) == (each.contenders[0].settings["local_steps"],
                                                         each.contenders[0].settings["batch_size"])  # fmt: skip
        moves = {tuple(tried) for tried in work.values()}
        assert len(moves) == 1 or each.name == "family-hyper-representation"  # whose local methods begin lower
        assert len(moves) <= 2
        assert set.intersection(*map(set, moves))  # and meet the others' grid


def test_shrofbo_with_equal_steps_is_simfbo():
    """Which is why the family's studies run it once."""
    task = TASKS["quadratic"]()
    ends = [
        solve(task.problem, task.data, plain(ALGORITHMS[name], local_steps=3), task.x, task.y, 5, key=task.key).x
        for name in ("simfbo", "shrofbo")
    ]
    np.testing.assert_allclose(*map(np.asarray, ends), rtol=1e-10)


def test_the_family_s_summary_says_what_each_goal_took(tmp_path):
    ran = []

    def run(name, folder):
        ran.append((name, folder))
        if name not in studies:
            return
        folder.mkdir(parents=True)
        # all seeds; most of them; fewer than half; none, of a run that was short, and of a whole one
        rows = [spent("Lockstep (ours)", 3, 10.0), spent("FedNest, full", 2, 11.0), spent("FedMSA", 1, np.inf)]
        rows += [spent("SimFBO", 0, np.inf, np.inf), spent("LFedNest", 0, np.inf, np.inf)]
        pandas.DataFrame(rows).to_csv(folder / "spent.csv", index=False)

    def spent(label, reached, median, least=8.0):
        row = {"algorithm": label, "seeds": 3, "reached": reached}
        for axis in ("rounds", "megabytes_up", "oracle_calls"):
            row |= {axis: median, f"{axis}_least": least, f"{axis}_most": 12.0 if reached == 3 else np.inf}
        return row

    studies = {each.name: each for each in family.PARTS}
    files = summary.family(tmp_path, run, studies)
    assert ran == [(name, tmp_path / name) for name in summary.STUDIES]
    assert [file.name for file in files] == ["family.csv", "family.md", "family.tex", "family.png"]
    rows = (tmp_path / "family" / "family.md").read_text().splitlines()
    assert rows[0].count("rounds") == 3
    assert "hyper-representation: test accuracy 90 %" in rows[0]
    assert rows[2].startswith("| Lockstep (ours) | 10 | 10 | 10 |")
    assert rows[3].startswith("| FedNest, full | 11 (2 of 3 seeds) | 11 | 11 |")
    assert rows[4].startswith("| FedMSA | 1 of 3 seeds | - | - |")
    assert rows[5].startswith("| SimFBO | never | - | - | not in 240 | - | - | never | - | - |")
    assert rows[6].startswith("| LFedNest | never | - | - | never | - | - | never | - | - |")


def test_the_family_s_figure_is_drawn_when_nobody_arrives(tmp_path):
    small = {each.name: catalogue.quick(each) for each in family.PARTS}
    nothing = {"seeds": 2, "reached": 0, "level": 1} | {
        f"{axis}{end}": np.inf for axis in tables.AXES for end in ("", "_least", "_most")
    }

    def run(name, folder):
        if name in small:
            folder.mkdir()
            rows = [{"algorithm": c.label, **nothing} for c in small[name].contenders]
            pandas.DataFrame(rows).to_csv(folder / "spent.csv", index=False)

    assert summary.family(tmp_path, run, small)[-1].stat().st_size > 0


def test_the_family_refuses_before_it_begins(tmp_path):
    (tmp_path / "family-regularisation").mkdir()
    (tmp_path / "family-regularisation" / "study.json").write_text("{}")
    with pytest.raises(InputError, match="holds another study"):
        catalogue.reproduce("family", tmp_path, small=True, data_dir=None, checked_in=False)
    with pytest.raises(InputError, match="leave --quick or --checked-in out"):
        catalogue.reproduce("family", tmp_path / "new", small=True, data_dir=None, checked_in=True)
    assert [path.name for path in tmp_path.iterdir()] == ["family-regularisation"]


def test_the_family_asks_for_its_data_before_it_begins(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        catalogue.reproduce("family", tmp_path / "x", small=False, data_dir="nowhere", checked_in=False)
    assert list(tmp_path.iterdir()) == []
