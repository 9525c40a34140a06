"""The studies of why it works: their closed forms, points that equal their formulas, wrong formulas that are found out."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest

import fedbilevel as fb
from fedbilevel_studies.theory import (
    THEORY,
    common,
    components,
    estimator,
    problems,
    rounds,
    runner,
    speedup,
    spread,
    unequal,
)
from fedbilevel_studies.theory.family import CURVATURE, PROBLEM, family

SILENT = lambda text: None


def run(name, folder):
    """The study's quick version, and its files by name."""
    files = THEORY[name][1](folder, True, SILENT)
    assert all(file.is_file() and file.stat().st_size > 0 for file in files)
    assert {file.suffix for file in files} == {".csv", ".md", ".png"}
    return {file.name: file for file in files}


# The problems ----------------------------------------------------------------------------------------------------------


def test_the_family_has_the_closed_form_it_claims():
    f = family(2.0)
    x, y, data = jnp.asarray(f.x), jnp.asarray(f.y), f.data()
    np.testing.assert_allclose(fb.reference.solution(PROBLEM, data, x, y), f.solution(f.x), atol=1e-12)
    np.testing.assert_allclose(fb.reference.hypergradient(PROBLEM, data, x, y), f.hypergradient(f.x), atol=1e-11)
    curvature = np.linalg.eigvalsh(f.upper()[0])
    np.testing.assert_allclose([f.eigenvalues[-1], curvature[-1]], 1)
    np.testing.assert_allclose([1 / f.eigenvalues[0], 1 / curvature[0]], [13, 56])


def test_heterogeneity_moves_the_clients_and_not_the_problem():
    alike, apart = family(0), family(2)
    for name in ("H", "B", "b", "A"):
        of = lambda f, name=name: getattr(f, name)
        np.testing.assert_allclose(of(alike).mean(0), of(apart).mean(0), atol=1e-12)
        assert np.ptp(of(alike), axis=0).max() < 1e-12 < 0.1 < np.ptp(of(apart), axis=0).max()
    np.testing.assert_allclose(alike.hypergradient(alike.x), apart.hypergradient(apart.x), atol=1e-10)
    assert np.linalg.eigvalsh(apart.H).min() > 0.02
    error = np.linalg.norm(spread.local_limit(apart) - apart.hypergradient(apart.x))
    assert error > CURVATURE
    assert np.linalg.norm(spread.local_limit(alike) - alike.hypergradient(alike.x)) < 1e-12


def test_the_stationarity_that_is_compiled_in_is_the_reference_s():
    setup, f = problems.quadratic(), family(1)
    assert float(setup.stationarity(setup.x)) == pytest.approx(f.hypergradient(f.x) @ f.hypergradient(f.x))
    assert problems.check(problems.ridge()) == pytest.approx(1, abs=1e-9)


def test_what_few_terms_can_see():
    f, few, many = family(1), rounds.visible(family(1), 2, 1.5), rounds.visible(family(1), 500, 1.5)
    x = jnp.asarray(f.x)
    assert float(many(x)) == pytest.approx(f.hypergradient(f.x) @ f.hypergradient(f.x))
    assert float(few(x)) != pytest.approx(float(many(x)), rel=0.1)


# The runner ------------------------------------------------------------------------------------------------------------


def test_a_race_is_what_solve_does():
    setup = problems.quadratic()
    algorithm = fb.AggITD(inner_rounds=1, local_steps=1, truncation="full", warm_start_v=True)
    lanes = {"inner_lr": [0.5, 1.0, 1.5], "hessian_lr": [0.5, 1.0, 1.9], "outer_lr": [0.01, 0.5, 1.9]}
    race = runner.race(setup, algorithm, 1e-2, 1_000, **lanes)
    alone = runner.stack(algorithm, **{name: [values[race.lane]] for name, values in lanes.items()})
    alone = jax.tree.map(lambda leaf: leaf[0], alone)
    metrics = {"stationarity": lambda x, y: setup.stationarity(x)}
    history = fb.solve(
        setup.problem, setup.data, alone, setup.x, setup.y, race.iterations, key=setup.key, metrics=metrics
    ).history
    below = history.column("stationarity") < 1e-2
    assert below[-1] and not below[:-1].any()
    assert history[-1]["rounds"] == race.rounds == 5 * race.iterations
    assert history[-1]["stationarity"] == pytest.approx(race.last[race.lane], rel=1e-9)


# Points and formulas ---------------------------------------------------------------------------------------------------


def test_the_estimator_s_points_equal_their_formulas_and_a_wrong_one_is_refused(tmp_path, monkeypatch):
    for name in ("bias", "q-variance"):
        files = run(name, tmp_path)
        frame = pandas.read_csv(files[f"{name}.csv"])
        np.testing.assert_allclose(frame["measured"], frame["formula"], rtol=1e-9)
    assert (frame["measured"] < frame["bound"]).all()
    bias, moment = estimator.bias_formula, estimator.moment_formula
    monkeypatch.setattr(estimator, "bias_formula", lambda f, N, lam: bias(f, N - 1, lam))
    with pytest.raises(fb.RunError, match="bias: a measured point is off its formula"):
        run("bias", tmp_path / "wrong")
    monkeypatch.setattr(estimator, "moment_formula", lambda f, N, lam: moment(f, N, lam) * (1 + 1e-8 * (N == 4)))
    with pytest.raises(fb.RunError, match=r"q-variance: .* N 4"):
        run("q-variance", tmp_path / "wrong")
    monkeypatch.setattr(estimator, "moment_formula", moment)
    monkeypatch.setattr(estimator, "moment_bound", lambda f, N, lam: moment(f, N, lam) / 2)
    with pytest.raises(fb.RunError, match="above its bound"):
        run("q-variance", tmp_path / "bound")


def test_a_finished_table_is_used_again_and_one_of_other_settings_is_not(tmp_path):
    made = []

    def rows():
        made.append(1)
        return [{"a": 0.1 + 0.2, "b": np.inf}]

    first = common.table(tmp_path, "t", {"N": (1, 2)}, rows)
    again = common.table(tmp_path, "t", {"N": (1, 2)}, rows)
    pandas.testing.assert_frame_equal(first, again)
    assert len(made) == 1
    common.table(tmp_path, "t", {"N": (1, 3)}, rows)
    assert len(made) == 2
    with pytest.raises(ZeroDivisionError):
        common.table(tmp_path, "t", {"N": (4,)}, lambda: 1 // 0)
    common.table(tmp_path, "t", {"N": (1, 3)}, rows)  # what an interrupted run leaves counts for nothing
    assert len(made) == 3


def test_points_off_their_formula_are_refused():
    frame = lambda measured: pandas.DataFrame(
        [{"N": 1, **common.point(1, 1, 1)}, {"N": 2, **common.point(measured, 1, 1)}]
    )
    common.agree(frame(1 + 1e-10), "a study")
    for measured in (1 + 1e-8, np.nan):
        with pytest.raises(fb.RunError, match=r"a study: .* N 2"):
            common.agree(frame(measured), "a study")


def test_one_cohort_for_everything_is_biased_however_many_terms():
    f = family(1.0)
    error = lambda name, N: np.linalg.norm(components.expected(f, name, N) - f.hypergradient(f.x))
    assert error("fresh cohorts", 200) < 1e-8
    assert error("one cohort", 200) > 0.1


# Whole studies ---------------------------------------------------------------------------------------------------------


def test_simfbo_s_floor_is_what_every_cohort_does_to_it():
    """S is a fixed point of one round, averaged over ALL cohorts: written out, not sampled."""
    f, rates, cohort = family(0.3, 5), (0.1, 0.3, 0.3), 2
    S = speedup.covariance(f, cohort, rates)
    E = np.diag(np.repeat(rates, [len(f.x), len(f.y), len(f.y)]))
    z = unequal.weighted_solution(f, None)
    parts = [unequal.linear(f, i) for i in range(5)]
    after, drift = [], []
    for asked in itertools.combinations(range(5), cohort):
        M, m = (np.mean([parts[i][k] for i in asked], axis=0) for k in (0, 1))
        A, d = np.eye(len(z)) - E @ M, E @ (M @ z + m)
        after.append(A @ S @ A.T + np.outer(d, d))
        drift.append(d)
    np.testing.assert_allclose(np.mean(after, axis=0), S, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.mean(drift, axis=0), 0, atol=1e-12)  # so that the mean of z stays z*
    assert np.all(np.linalg.eigvalsh(S) > 0)


def test_lanes_may_have_keys_of_their_own():
    setup = problems.quadratic(8, 0.3, 2)
    algorithm = fb.SimFBO(local_steps=1)
    lanes = {"inner_lr": [0.3, 0.3, 0.3], "hessian_lr": [0.3] * 3, "outer_lr": [0.1] * 3}
    used, alike = runner.curves(setup, algorithm, 20, 5, **lanes)
    again, own = runner.curves(setup, algorithm, 20, 5, jax.random.split(jax.random.key(1), 3), **lanes)
    same, one = runner.curves(setup, algorithm, 20, 5, jnp.stack([setup.key] * 3), **lanes)
    assert used.tolist() == again.tolist() == same.tolist() == [4, 8, 12, 16, 20]
    np.testing.assert_allclose(one, alike, rtol=1e-12)
    assert np.ptp(alike[:, -1]) < 1e-12 < np.ptp(own[:, -1])


@pytest.mark.slow
def test_heterogeneity(tmp_path, monkeypatch):
    frame = pandas.read_csv(run("heterogeneity", tmp_path)["heterogeneity.csv"])
    assert set(frame["method"]) == {"AggITD", "FedNest", "LFedNest"}
    assert set(frame["quantity"]) == {"error", "deviation", "floor"}
    floors = frame[frame["quantity"] == "floor"].set_index("spread")["measured"]
    assert floors[0.0] < 1e-12 < 1 < floors[2.0]
    formula = spread.formula
    monkeypatch.setattr(spread, "formula", lambda f, method, N: formula(f, method, N + (method == "FedNest")))
    with pytest.raises(fb.RunError, match="method FedNest"):
        run("heterogeneity", tmp_path / "wrong")


@pytest.mark.slow
def test_rounds_ratio(tmp_path):
    frame = pandas.read_csv(run("rounds-ratio", tmp_path)["rounds-ratio.csv"])
    np.testing.assert_allclose(frame["ratio"], frame["formula"], rtol=0.05)


@pytest.mark.slow
def test_rounds_table(tmp_path):
    files = run("rounds-table", tmp_path)
    frame = pandas.read_csv(files["rounds-table-ridge.csv"]).set_index(["local_steps", "method"])["rounds"]
    assert np.isfinite(frame[1, "AggITD, full, warm v (ours)"])
    cohorts = pandas.read_csv(files["rounds-table-cohorts-ridge.csv"])
    assert np.isfinite(cohorts[["floor", "rounds"]].to_numpy(float)).all()


@pytest.mark.slow
def test_ablation(tmp_path, monkeypatch):
    files = run("ablation", tmp_path)
    assert (pandas.read_csv(files["ablation.csv"])["stationarity"] > 0).all()
    monkeypatch.setattr(components, "expected", lambda f, name, N: spread.formula(f, "AggITD", 2 * N)[0])
    with pytest.raises(fb.RunError, match="cohorts"):
        run("ablation", tmp_path / "wrong")


@pytest.mark.slow
def test_unequal_steps_mislead_simfbo_alone(tmp_path, monkeypatch):
    frame = pandas.read_csv(run("unequal-steps", tmp_path)["unequal-steps.csv"]).set_index(["scale", "method"])[
        "measured"
    ]
    assert frame[0.3, "ShroFBO"] < frame[1.0, "ShroFBO"] < 0.05 < frame[1.0, "SimFBO"] < frame[0.3, "SimFBO"]
    right = unequal.fixed_point
    monkeypatch.setattr(
        unequal, "fixed_point", lambda f, rates, taus, normalised=False: right(f, rates, taus, not normalised)
    )
    with pytest.raises(fb.RunError, match="off its formula"):
        run("unequal-steps", tmp_path / "wrong")


@pytest.mark.slow
def test_every_method_against_rounds(tmp_path):
    frame = pandas.read_csv(run("stationarity", tmp_path)["stationarity.csv"])
    last = frame.groupby("method")["value"].last()
    assert last["Lockstep (ours)"] < 1e-8 and last["SimFBO"] < 1e-8 and last["LocalBSGM"] > 1e-3


@pytest.mark.slow
def test_the_floor_falls_with_the_cohort(tmp_path, monkeypatch):
    frame = pandas.read_csv(run("speed-up", tmp_path)["speed-up.csv"]).set_index(["method", "cohort"])["measured"]
    variances = (64 - 4) / 4 * 16 / (64 - 16)
    assert frame["SimFBO", 4] / frame["SimFBO", 16] == pytest.approx(variances, rel=0.25)
    assert frame["Lockstep (ours)", 4] < 1e-9
    right = speedup.floor
    monkeypatch.setattr(speedup, "floor", lambda f, cohort, scale: 1.3 * right(f, cohort, scale))
    with pytest.raises(fb.RunError, match="off its formula"):
        run("speed-up", tmp_path / "wrong")
