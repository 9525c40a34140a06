"""Studies: an interrupted study goes on, tables are written as the runs were, the command refuses in one sentence."""

import dataclasses
import json
import tomllib
from pathlib import Path

import jax
import numpy as np
import pandas
import pytest

import fedbilevel as fb
from fedbilevel.errors import InputError
from fedbilevel_studies import catalogue, search, stages, tables
from fedbilevel_studies.oracles import oracle_calls
from helpers.plain import plain
from helpers.small_study import SMALL


def test_oracle_calls_are_those_counted_by_hand():
    # N = 2: an anchor and two of three local steps evaluate twice; factors for t = 1, 2; d_y f for t = 0, 1, 2
    full = oracle_calls(plain(fb.AggITD, inner_rounds=2, local_steps=3, truncation="full"))
    assert full == {
        "inner_gradient": 10,
        "inner_gradient_x": 0,
        "hessian_vector": 2,
        "cross_vector": 1,
        "outer_gradients": 4,
        "all": 17,
    }
    uniform = oracle_calls(plain(fb.AggITD, inner_rounds=2, local_steps=3))
    assert uniform["hessian_vector"] == pytest.approx(1)  # N - Q on average
    assert uniform["outer_gradients"] == pytest.approx(2)
    nest = oracle_calls(plain(fb.FedNest, inner_rounds=2, local_steps=3, neumann_terms=4, truncation="full"))
    assert nest == {
        "inner_gradient": 10,
        "inner_gradient_x": 0,
        "hessian_vector": 4,
        "cross_vector": 1,
        "outer_gradients": 2,
        "all": 17,
    }
    penalty = oracle_calls(
        plain(fb.FedF2SA, inner_rounds=2, local_steps=3)
    )  # two gradients of g and one of f a local step
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
    assert oracle_calls(plain(fb.FedMSA, local_steps=2), clients=6, cohort=3)["all"] == 2 * look + steps
    # FedMBO asks a cohort for y, and one client each for a chain's start, its factors (one of three on average) and its end
    chains = {"inner_rounds": 2, "local_steps": 1, "neumann_terms": 3, "chains": 2}
    assert oracle_calls(plain(fb.FedMBO, **chains), clients=6, cohort=3)["all"] == pytest.approx(
        2 + 2 * (1 + 1 + 2) / 3
    )


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


def test_where_a_study_is_kept():
    out = Path("out")
    assert catalogue.folder_of("equal-n5", out, several=True) == out / "equal-n5"
    assert catalogue.folder_of("equal-n5", out, several=False) == out
    assert catalogue.folder_of("family", out, several=True) == out  # its parts lie beside the others
