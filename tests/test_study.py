"""Studies: the sweep equals single runs, grids are judged by hand-made curves, an interrupted study goes on."""

import dataclasses
import json
import tomllib
from pathlib import Path

import jax
import numpy as np
import pandas
import pytest

import fedbilevel as fb
from fedbilevel import solve
from fedbilevel.algorithms import ALGORITHMS
from fedbilevel.errors import InputError
from fedbilevel.experiments import catalogue, family, memory, search, stages, study, summary, tables
from fedbilevel.experiments.oracles import oracle_calls
from fedbilevel.experiments.sweep import points, sweep
from fedbilevel.tasks import TASKS, Options
from fedbilevel.testing import distance, heterogeneous

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


@pytest.mark.parametrize("cohort", [pytest.param(None, marks=pytest.mark.slow), 4])
def test_a_sweep_gives_what_single_runs_give(cohort):
    problem, data, x, y = heterogeneous()
    metrics = {"u": lambda x, y: x["u"][0], "s": lambda x, y: y["deep"]["s"]}
    grid = points({"inner_lr": (0.02, 0.05), "outer_lr": (0.03, 0.1)})
    algorithm = fb.AggITD(inner_rounds=2, local_steps=2, outer_steps=2, batch_size=2, hessian_lr=0.1)
    common = {"key": jax.random.key(3), "engine": fb.Simulation(cohort=cohort), "metrics": metrics}
    single = lambda settings: fb.solve(
        problem, data, dataclasses.replace(algorithm, **settings), x, y, rounds=30, evaluate_every=2, **common
    )
    histories = [single(settings).history for settings in grid]
    for at_once in (4, 3):
        curves = sweep(problem, data, algorithm, grid, x, y, rounds=30, at_once=at_once, evaluate_every=2, **common)
        assert [curve.settings for curve in curves] == grid
        for curve, history in zip(curves, histories, strict=True):
            assert curve.rounds.tolist() == history.column("rounds").tolist()
            for name in metrics:
                assert distance(history.column(name), curve.metrics[name]) < 1e-12
    assert distance(curves[0].metrics["u"], curves[1].metrics["u"]) > 1e-6  # the step sizes do reach the program


def test_a_point_that_blows_up_leaves_the_others_alone():
    problem, data, x, y = heterogeneous()
    algorithm = fb.AggITD(inner_rounds=2, hessian_lr=0.1)
    grid = points({"inner_lr": (0.05, 1e6)})
    good, bad = sweep(problem, data, algorithm, grid, x, y, rounds=70, key=jax.random.key(0),
                      metrics={"s": lambda x, y: y["deep"]["s"]})  # fmt: skip
    assert np.isfinite(good.metrics["s"]).all()
    assert np.isnan(bad.metrics["s"][-1])


def test_runs_are_judged_by_the_median_of_five():
    rounds = np.arange(8) * 10
    falling = np.array([1.0, 0.9, 0.6, 0.9, 0.69, 0.69, 0.69, 0.5])
    assert search.judge(SMALL, rounds, falling, 30) == (50.0, 50.0)  # one lucky evaluation does not count
    at, score = search.judge(SMALL, rounds, np.array([0.6] * 5 + [0.9] * 3), 30)  # nor does a run that falls back
    assert (at, score) == (40.0, pytest.approx(30 * (1 + 0.2 / 0.7)))
    at, score = search.judge(SMALL, rounds, falling + 0.7, 30)
    assert at == np.inf
    assert score == pytest.approx(30 * (1 + 0.69 / 0.7))  # how far the last median, 1.39, is from the goal
    assert search.judge(SMALL, rounds, np.full(8, np.nan), 30)[1] > score


def test_oracle_calls_are_those_counted_by_hand():
    # N = 2: an anchor and two of three local steps evaluate twice; factors for t = 1, 2; d_y f for t = 0, 1, 2
    full = oracle_calls(fb.AggITD(inner_rounds=2, local_steps=3, truncation="full"))
    assert full == {
        "inner_gradient": 10,
        "inner_gradient_x": 0,
        "hessian_vector": 2,
        "cross_vector": 1,
        "outer_gradients": 4,
        "all": 17,
    }
    uniform = oracle_calls(fb.AggITD(inner_rounds=2, local_steps=3))
    assert uniform["hessian_vector"] == pytest.approx(1)  # N - Q on average
    assert uniform["outer_gradients"] == pytest.approx(2)
    nest = oracle_calls(fb.FedNest(inner_rounds=2, local_steps=3, neumann_terms=4, truncation="full"))
    assert nest == {
        "inner_gradient": 10,
        "inner_gradient_x": 0,
        "hessian_vector": 4,
        "cross_vector": 1,
        "outer_gradients": 2,
        "all": 17,
    }
    penalty = oracle_calls(fb.FedF2SA(inner_rounds=2, local_steps=3))  # two gradients of g and one of f a local step
    assert penalty == {
        "inner_gradient": 12,
        "inner_gradient_x": 2,
        "hessian_vector": 0,
        "cross_vector": 0,
        "outer_gradients": 7,
        "all": 21,
    }


def test_oracle_calls_of_those_who_ask_others_than_the_cohort():
    # FedMSA looks with everybody, at two points, four oracles each; then 2 local steps of a cohort, at two points
    look, steps = 2 * 4, 2 * 2 * 4
    assert oracle_calls(fb.FedMSA(local_steps=2), clients=6, cohort=3)["all"] == 2 * look + steps
    # FedMBO asks a cohort for y, and one client each for a chain's start, its factors (one of three on average) and its end
    chains = {"inner_rounds": 2, "local_steps": 1, "neumann_terms": 3, "chains": 2}
    assert oracle_calls(fb.FedMBO(**chains), clients=6, cohort=3)["all"] == pytest.approx(2 + 2 * (1 + 1 + 2) / 3)


@pytest.mark.slow
def test_a_study_runs_goes_on_and_writes_its_tables(tmp_path):
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):  # as the command runs it
        runs_goes_on_and_writes(tmp_path)


def runs_goes_on_and_writes(tmp_path):
    folder = tmp_path / "study"
    stages.run(dataclasses.replace(SMALL, seeds=(0,)), folder)
    before = (folder / "grid.csv").read_text()
    with pytest.raises(InputError, match="another study"):
        stages.run(SMALL, folder)
    (folder / "study.json").write_text(json.dumps(SMALL.to_dict()))
    stamp = (folder / "runs" / "AggITD, full-0" / "done.json").stat().st_mtime_ns
    stages.run(SMALL, folder)
    assert (folder / "grid.csv").read_text() == before
    assert (folder / "runs" / "AggITD, full-0" / "done.json").stat().st_mtime_ns == stamp
    files = {file.name for file in tables.write(SMALL, folder)}
    assert files >= {
        "history.csv",
        "levels.csv",
        "levels.md",
        "levels.tex",
        "ratios.csv",
        "shares.csv",
        "test_error.png",
    }
    assert (folder / "settings.md").read_text().count("(e)") == 0  # two values of a step have no inside
    spent = pandas.read_csv(folder / "spent.csv")
    assert set(spent["level"]) == {SMALL.goal}
    history = pandas.read_csv(folder / "history.csv")
    assert set(history["algorithm"]) == {"AggITD, full", "FedNest", "still"}
    moved = history[history["algorithm"] == "AggITD, full"].groupby("seed")["rounds"].max()
    assert (moved == 56).all()  # the whole iterations of 7 rounds in 60
    grid = pandas.read_csv(folder / "grid.csv")
    first, again = (grid[grid["seed"] == seed] for seed in (10, 11))
    assert len(first) == 4 + 2 * 4 + 2 + 4
    assert (again.groupby("label").size() == 2).all()
    steps = ["neumann_terms", "inner_lr", "outer_lr"]
    ranked = first[first["label"] == "FedNest"].sort_values("score", kind="stable")[steps].head(2).to_numpy()
    tried = again[again["label"] == "FedNest"][steps].to_numpy()
    assert sorted(ranked.tolist()) == sorted(tried.tolist())
    chosen = again[again["label"] == "FedNest"].sort_values("score", kind="stable").iloc[0]
    found = tomllib.loads((folder / "settings.toml").read_text())["FedNest"]
    assert found == {name: chosen[name] for name in ("neumann_terms", "inner_lr", "hessian_lr", "outer_lr")}
    best = again[again["label"] == "AggITD, full"].sort_values("score").iloc[0]
    assert f"inner_lr = {best['inner_lr']}" in (folder / "settings.toml").read_text().split("[")[1]
    shares = pandas.read_csv(folder / "shares.csv")
    assert set(shares["algorithm"]) == {"AggITD, full", "FedNest"}
    assert (shares["share"] == 1).all()  # the outer loss of ridge does not contain x


def test_finished_runs_are_not_mixed_with_other_step_sizes(tmp_path):
    best = {"FedNest": {"inner_lr": 0.1, "outer_lr": 1 / 3}}
    search.write_settings(tmp_path / "settings.toml", best)
    other = {"FedNest": {"inner_lr": 0.2, "outer_lr": 1 / 3}}
    stages.same_settings(tmp_path, other)  # nothing was run yet
    (tmp_path / "runs" / "FedNest-0").mkdir(parents=True)
    (tmp_path / "runs" / "FedNest-0" / "done.json").write_text("{}")
    stages.same_settings(tmp_path, best)
    with pytest.raises(InputError, match="FedNest with other step sizes"):
        stages.same_settings(tmp_path, other)


def test_ratios_are_paired_by_seed():
    rows = []
    for label, per, speed in (("AggITD, full", 7, 0.1), ("FedNest", 9, 0.1)):
        for seed in (0, 1):
            for k in range(12):
                spent = {
                    "iteration": k,
                    "megabytes_up": k,
                    "oracle_calls": k,
                    "seconds": k,
                    "rounds": per * k * (1 + seed),
                }
                rows.append({"algorithm": label, "seed": seed, "kind": "rival", "test_error": 1 - speed * k} | spent)
    frame = pandas.DataFrame(rows)
    table = tables.ratios_table(SMALL, frame)
    assert np.allclose(table["ratio"], 7 / 9)
    assert table["seeds"].tolist() == [2, 2]
    levels = tables.levels_table(SMALL, frame, SMALL.levels)
    first = levels[(levels["algorithm"] == "AggITD, full") & (levels["level"] == 0.8)].iloc[0]
    assert (first["rounds_least"], first["rounds"], first["rounds_most"]) == (28, 42, 56)  # median of k = 0..4 is 0.8


def test_a_choice_at_the_edge_of_its_grid_is_marked(tmp_path):
    wide = dataclasses.replace(SMALL, grid={**SMALL.grid, "outer_lr": (0.1, 0.3, 1.0)})
    best = {c.label: wide.candidates(c)[-1] for c in wide.contenders}  # the largest of all
    search.write_settings(tmp_path / "settings.toml", best)
    _, (head, rows) = tables.settings_table(wide, tmp_path)
    cells = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert cells["FedNest"]["outer lr"] == "1 (e)"
    assert (cells["FedNest"]["inner lr"], cells["FedNest"]["neumann terms"]) == ("0.1", "2")
    assert cells["still"]["outer lr"] == "-"
    best["FedNest"] = {**best["FedNest"], "outer_lr": 0.3}
    search.write_settings(tmp_path / "settings.toml", best)
    assert "(e)" not in tables.settings_table(wide, tmp_path)[1][1][1][-1]
    on = dataclasses.replace(wide, beyond=3)  # an edge of what it began with is none then
    best["FedNest"] = {**best["FedNest"], "inner_lr": 0.3, "outer_lr": 1.0}
    search.write_settings(tmp_path / "settings.toml", best)
    _, (head, rows) = tables.settings_table(on, tmp_path)
    cells = dict(zip(head, rows[1], strict=True))
    assert (cells["inner lr"], cells["outer lr"]) == ("0.3 (b)", "1")


def test_the_neighbours_of_a_point():
    tried = points({"inner_lr": (0.1, 0.3), "outer_lr": (1 / 3, 1.0, 2.0), "hessian_lr": (0.05,)})
    best = {"inner_lr": 0.3, "outer_lr": 1 / 3, "hessian_lr": 0.05}
    beyond = [best | {"inner_lr": 0.9}, best | {"outer_lr": 0.111111}]  # by the ratio of the last two
    assert search.neighbours(best, tried, best) == beyond
    found = search.neighbours(beyond[0], [*tried, *beyond], best)  # beside it nothing but the old best was tried
    assert [point["inner_lr"] for point in found] == [2.7, 0.9, 0.9]
    assert [point["outer_lr"] for point in found] == [1 / 3, 0.111111, 1.0]


def test_a_grid_goes_on_until_no_neighbour_is_better(tmp_path, monkeypatch):
    low = {"inner_lr": (0.001, 0.002), "hessian_lr": (0.05,), "outer_lr": (0.5, 2.0)}
    first = dataclasses.replace(
        SMALL.contenders[0], label="another", variants=({"inner_rounds": 1}, {"inner_rounds": 3})
    )
    one = dataclasses.replace(SMALL, contenders=(first, SMALL.contenders[1]), grid=low, beyond=9)
    batches, room = [], [1000]  # what was tried, and how often more may be tried

    def score(self, points, seed, rounds, soonest, whole):
        """A valley whose bottom is far from where the grid begins, and moves with the seed and the variant."""
        if len(batches) == room[0]:
            raise KeyboardInterrupt
        batches.append((self.contender.label, seed, len(points)))
        off = lambda p: np.log(p["inner_lr"] / 0.03) ** 2 + 0.1 * np.log(p["outer_lr"] / (0.04 * seed)) ** 2
        own = {"label": self.contender.label, "seed": seed}
        return [own | p | {"score": off(p) + 0.3 * p.get("neumann_terms", 0)} for p in points]

    monkeypatch.setattr(search._Grid, "_try", score)
    found = search.search(one, tmp_path, None, print)
    whole, count = (tmp_path / "grid.csv").read_text(), len(batches)
    rows = pandas.read_csv(tmp_path / "grid.csv")
    mine = rows[(rows["label"] == "FedNest") & (rows["seed"] == 10)]
    tried = mine[["neumann_terms", *low]].to_dict("records")
    top = tried[int(mine["score"].argmin())]
    assert (top["inner_lr"], top["outer_lr"]) == (pytest.approx(0.032), 0.5)
    assert search.neighbours(top, tried, low) == []  # all of them were tried, and are no better
    assert found["FedNest"] in tried
    assert [entry for entry in batches if entry[1] == 11] == [("another", 11, 2), ("FedNest", 11, 2)]
    assert found == search.search(one, tmp_path, None, print)
    assert len(batches) == count  # everything was kept
    for room[0] in range(count):  # interrupted before each batch
        (tmp_path / "grid.csv").unlink()
        batches.clear()
        with pytest.raises(KeyboardInterrupt):
            search.search(one, tmp_path, None, print)
        room[0], done = 1000, len(batches)
        assert search.search(one, tmp_path, None, print) == found
        assert len(batches) == count > done
        assert (tmp_path / "grid.csv").read_text() == whole


@pytest.mark.parametrize(("unstable", "looked_at", "chosen"), [(0, 2, 0), (1, 2, 1), (3, 4, 3), (6, 6, 0)])
def test_a_second_look_goes_on_until_a_point_holds(tmp_path, monkeypatch, unstable, looked_at, chosen):
    # the soonest come first, and blow up on one of the other seeds
    rates = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06)
    alone = dataclasses.replace(SMALL.contenders[1], variants=({},))
    one = dataclasses.replace(
        SMALL, contenders=(alone,), grid={"inner_lr": rates, "hessian_lr": (0.05,), "outer_lr": (1.0,)},
        beyond=0, shortlist=2, shortlist_seeds=(11, 12),
    )  # fmt: skip
    again = set()

    def score(self, points, seed, rounds, soonest, whole):
        if whole:
            again.update(point["inner_lr"] for point in points)
        blown = lambda p: whole and seed == 12 and rates.index(p["inner_lr"]) < unstable
        own = {"label": self.contender.label, "seed": seed}
        return [own | p | {"score": 11.0 * rounds if blown(p) else 100 * p["inner_lr"]} for p in points]

    monkeypatch.setattr(search._Grid, "_try", score)
    found = search.search(one, tmp_path, None, print)[one.contenders[0].label]
    assert (len(again), found["inner_lr"]) == (looked_at, rates[chosen])


def test_a_run_that_blew_up_is_drawn_to_the_end():
    good = {"iteration": range(9), "rounds": range(0, 90, 10), "test_accuracy": 0.9, "seed": 0, "failure": None}
    bad = {"iteration": range(6), "rounds": range(0, 60, 10), "test_accuracy": 0.8, "seed": 1, "failure": "blew up"}
    runs = pandas.concat([pandas.DataFrame(good), pandas.DataFrame(bad)])
    grid, middle, least, most = tables._band(runs, "rounds", "test_accuracy")
    assert (grid[0], grid[-1]) == (40, 80)
    assert (least[0], least[-1], most[-1]) == (0.8, 0.0, 0.9)
    assert middle[-1] == pytest.approx(0.45)


def test_ratios_with_a_run_that_never_arrives_say_so():
    row = {"one": "a", "other": "b", "level": 0.9, "seeds": 2, "ratio": 0.5, "least": 0.0, "most": np.inf}
    assert tables._ratios_text(pandas.DataFrame([row]))[1][0][-1] == "0.50 (other never-never)"


def test_latex_escapes():
    assert tables.latex(["a", "b_c"], [["90 %", "1"]]).splitlines()[2:5] == [r"a & b\_c \\", r"\hline", r"90 \% & 1 \\"]


def test_every_study_builds_and_has_a_quick_form():
    for name, full in catalogue.STUDIES.items():
        small = catalogue.quick(full)
        assert small.name == name
        assert small.options.dataset in ("digits", "breast-cancer", "diabetes")
        json.dumps(full.to_dict())
        labels = [c.label for c in full.contenders]
        assert len(set(labels)) == len(labels)
        for contender in full.contenders:
            first = {rate: values[0] for rate, values in full.rates(contender).items()}
            contender.build(first)
        assert all(one in labels and other in labels for one, other in full.pairs)
        # every step size is tried, or set for good reason
        steps = {"inner_lr", "hessian_lr", "outer_lr"}
        for c in full.contenders:
            left_out = {"hessian_lr"} if c.algorithm == "fedf2sa" else steps if c.kind == "frozen" else set()
            assert steps - left_out <= set(full.rates(c)) | set(c.settings)


def test_the_command_line_refuses_in_one_sentence(fedbilevel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, sentence in (
        (["reproduce"], "name a study"),
        (["reproduce", "mnist-niid", "--out", "x"], "mnist-non-iid"),
        (["reproduce", "equal-n5"], "--out DIR"),
        (["reproduce", "equal-n5", "--quick", "--checked-in", "--out", "x"], "leave --quick or --checked-in out"),
        (["reproduce", "mnist-iid", "--data-dir", "nowhere", "--out", "x"], "nowhere"),
    ):
        code, _, errors = fedbilevel(*words)
        assert (code, sentence in errors, len(errors.strip().splitlines())) == (2, True, 1), errors
    assert list(tmp_path.iterdir()) == []  # nothing was written
    assert "equal-n5" in fedbilevel("reproduce", "--list")[1]


def test_checked_in_step_sizes_are_points_of_the_grid():
    for file in sorted((Path(catalogue.__file__).parent / "found").glob("*.toml")):
        full = catalogue.STUDIES[file.stem]
        rates = catalogue.found(file.stem)
        for contender in full.contenders:
            chosen, steps = rates[contender.label], full.rates(contender)
            if full.beyond:  # the steps may lie beyond those that the grid began with, by its ratios
                assert {name: value for name, value in chosen.items() if name not in steps} in contender.variants
                for name, values in steps.items():
                    on = list(values)
                    for _ in range(full.beyond if len(values) > 1 else 0):
                        on = [on[0] ** 2 / on[1], *on, on[-1] ** 2 / on[-2]]
                    assert np.isclose(chosen[name], on, rtol=1e-4).any(), (file.stem, contender.label, name)
            else:
                assert chosen in full.candidates(contender)
            contender.build(chosen)
    with pytest.raises(InputError, match="no step sizes are checked in for another-study"):
        catalogue.found("another-study")


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
        solve(task.problem, task.data, ALGORITHMS[name](local_steps=3), task.x, task.y, 5, key=task.key).x
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


def test_where_a_study_is_kept():
    out = Path("out")
    assert catalogue.folder_of("equal-n5", out, several=True) == out / "equal-n5"
    assert catalogue.folder_of("equal-n5", out, several=False) == out
    assert catalogue.folder_of("family", out, several=True) == out  # its parts lie beside the others


def test_the_family_asks_for_its_data_before_it_begins(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        catalogue.reproduce("family", tmp_path / "x", small=False, data_dir="nowhere", checked_in=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory maps are counted on Linux alone")
def test_compiled_programs_and_their_memory_maps_are_let_go():
    maps = lambda: len(Path("/proc/self/maps").read_text().splitlines())
    programs = [jax.jit(lambda x, k=k: jax.numpy.sin(x * k).sum()) for k in range(20)]
    memory.release(0)
    before = maps()
    for program in programs:
        program(jax.numpy.ones(10 * (1 + len(programs)))).block_until_ready()
    used = maps() - before
    assert used >= 20
    memory.release(10**9)  # not yet
    assert maps() - before >= used
    memory.release(0)
    assert maps() - before < used / 2
