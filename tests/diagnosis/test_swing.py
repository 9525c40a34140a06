"""x that swings is told at the end of a run, with the step that makes it; x that goes steadily, settles or is noisy is not.

The problem is linear in (x, y, v), number by number:

    g_i = mean of h y^2 / 2 - b x y,    f_i = mean of (y - t)^2 / 2,    z <- z - (outer_lr, inner_lr, hessian_lr) D(z)

for one local step, so that the eigenvalues of the iteration say what swings: the share of the slowest swing that is left
half a period later is |w|^(pi / angle).
"""

from __future__ import annotations

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.callbacks import CSV, Checkpoint
from fedbilevel.diagnosis.swing import Trail
from fedbilevel.engines.loopback import _Looped
from fedbilevel.errors import FedbilevelWarning
from fedbilevel.watch import Seen

DRAW = np.random.default_rng(0)
ROWS = [
    {
        "h": 1 + 0.6 * DRAW.random((n, 3)) * (1 + n / 16),
        "b": 1 + 0.3 * DRAW.normal(size=(n, 3)),
        "t": DRAW.normal(size=(n, 3)) + n,
    }
    for n in (4, 5, 6, 7)
]
H, B = (np.mean([e[name].mean(0) for e in ROWS], 0) for name in "hb")
inner = lambda x, y, e: 0.5 * jnp.sum(e["h"] * y**2) - jnp.sum(e["b"] * x * y)
outer = lambda x, y, e: 0.5 * jnp.sum((y - e["t"]) ** 2)
PROBLEM, DATA = fb.Problem(inner, outer), fb.FederatedData.stack(ROWS, ROWS)
X, Y, KEY, ITERATIONS = jnp.ones(3), jnp.zeros(3), jax.random.key(1), 400
KINDS = [fb.Lockstep, fb.SimFBO, fb.FedMSA]
SWINGING = {  # (inner_lr, hessian_lr, outer_lr): the step that is to be named
    (0.3, 0.02, 0.3): "hessian_lr",
    (0.3, 0.01, 0.1): "hessian_lr",
    (0.01, 0.3, 0.1): "inner_lr",
    (0.02, 0.02, 0.2): "outer_lr",
}
QUIET = [(0.3, 0.3, 0.02), (0.3, 0.1, 0.01), (0.5, 0.5, 0.05), (0.1, 0.3, 0.01), (0.3, 0.6, 0.05)]
WAYS = {
    "everything": ({}, None),
    "minibatches": ({"batch_size": 2}, None),
    "cohorts": ({}, fb.Simulation(cohort=2)),
    "both": ({"batch_size": 2}, fb.Simulation(cohort=3)),
}


def left(steps):
    """How much of the slowest swing is left half a period later."""
    worst = []
    for h, b in zip(H, B, strict=True):
        D = np.array([[0, 0, b], [-b, h, 0], [0, -1, h]])
        w = np.linalg.eigvals(np.eye(3) - np.diag([steps[2], steps[0], steps[1]]) @ D)
        w = w[np.argmax(np.abs(w))]
        worst.append(np.abs(w) ** (np.pi / np.abs(np.angle(w))) if np.angle(w) else 0.0)
    return max(worst)


def run(kind, steps, iterations=ITERATIONS, engine=None, data=DATA, x=X, **options):
    """(result, warnings)."""
    fields = {name: options.pop(name) for name in list(options) if name in kind.__dataclass_fields__}
    names = dict(zip(("inner_lr", "hessian_lr", "outer_lr"), steps, strict=True))
    algorithm = kind(**{"local_steps": 1, **names, **fields})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fb.solve(
            PROBLEM,
            data,
            algorithm,
            x,
            jnp.zeros_like(x),
            iterations,
            key=KEY,
            engine=engine,
            **{"evaluate_every": 50, **options},
        )
    return result, [str(w.message) for w in caught if issubclass(w.category, FedbilevelWarning)]


def test_the_settings_do_what_they_stand_for():
    assert all(left(steps) > 0.4 for steps in SWINGING)
    assert all(left(steps) < 0.05 for steps in QUIET)


def check(kind, way):
    options, engine = WAYS[way]
    for steps, field in SWINGING.items():
        _, told = run(kind, steps, engine=engine, **options)
        value = dict(zip(("inner_lr", "hessian_lr", "outer_lr"), steps, strict=True))[field]
        assert len(told) == 1 and f"{field} (now {value:g})" in told[0] and "\n" not in told[0], (steps, told)
        assert told[0].startswith("x swings") and set(re.findall(r"\w+_lr", told[0])) == {field}
    for steps in QUIET:
        assert run(kind, steps, engine=engine, **options)[1] == [], steps


@pytest.mark.parametrize("way", ["everything", "both"])
def test_a_swing_is_told_and_the_step_named(way):
    check(fb.Lockstep, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_swing_is_told_by_each_of_its_kin_with_rows_and_cohorts_sampled(kind, way):
    check(kind, way)


def test_what_has_settled_or_only_begun_is_quiet():
    swinging = (0.3, 0.02, 0.3)
    assert run(fb.Lockstep, swinging, 4000)[1] == []  # the swing has died away, what is left is rounding
    assert run(fb.Lockstep, swinging, 20)[1] == []  # too few to tell
    assert run(fb.Lockstep, (0.3, 0.3, 1e-4), 100)[1] == []  # far from the end, steadily
    assert run(fb.Lockstep, (0.3, 0.3, 0.1), 3000)[1] == []  # the end, and rounding


def test_a_vector_that_oversteps_is_named():
    step = 1.998 / H.max()
    _, told = run(fb.SimFBO, (0.3, step, 0.3), batch_size=2)
    assert len(told) == 1 and f"lower hessian_lr (now {step:g})" in told[0], told


@pytest.mark.slow
def test_candidates_are_named_where_nothing_can_be_repeated(monkeypatch):
    monkeypatch.setattr(_Looped, "replays", False)
    one = fb.FederatedData.stack(ROWS[:1], ROWS[:1])
    result, told = run(fb.Lockstep, (0.3, 0.02, 0.3), 220, engine=fb.Loopback(), data=one)
    assert len(told) == 1 and "raise hessian_lr (now 0.02)" in told[0]
    other, again = run(fb.Lockstep, (0.3, 0.02, 0.3), 220, data=one)
    assert again == told
    for name in ("turn", "vector_residual", "lower_gradient_norm"):
        np.testing.assert_allclose(result.history.column(name), other.history.column(name), rtol=1e-7)


# Columns ----------------------------------------------------------------------------------------------------------------


def test_columns_come_last_and_are_what_they_say(tmp_path):
    steps = (0.2, 0.2, 0.1)
    result, _ = run(fb.Lockstep, steps, 6, evaluate_every=1, callbacks=[CSV(tmp_path / "h.csv")])
    names = ["hypergradient_norm", "vector_growth", "vector_residual", "lower_gradient_norm", "turn"]
    assert list(result.history[-1])[-5:] == names
    x, y, v = np.ones((1, 3))[0], np.zeros(3), np.zeros(3)
    t = np.mean([e["t"].mean(0) for e in ROWS], 0)
    moves, pull = [], np.linalg.norm(y - t)
    for row in result.history[1:]:
        D = B * v, H * y - B * x, H * v - (y - t)
        np.testing.assert_allclose(row["vector_residual"], np.linalg.norm(D[2]) / pull, rtol=1e-9)
        np.testing.assert_allclose(row["lower_gradient_norm"], np.linalg.norm(D[1]), rtol=1e-9)
        moves.append(-steps[2] * D[0])
        x, y, v = x + moves[-1], y - steps[0] * D[1], v - steps[1] * D[2]
        if row["iteration"] > 2:  # in the first iteration x does not move
            one, two = moves[-2:]
            np.testing.assert_allclose(row["turn"], one @ two / np.linalg.norm(one) / np.linalg.norm(two), rtol=1e-9)
        else:
            assert np.isnan(row["turn"])
    first = (tmp_path / "h.csv").read_text().splitlines()[2].split(",")
    *others, growth, residual, slope, turn = first
    assert turn == "" and growth == "" and all((*others, residual, slope))  # the growth is not measured


@pytest.mark.slow
@pytest.mark.parametrize("kind", [fb.LFedNest, fb.FedF2SA, fb.FedBiOAccLocal])
def test_what_does_not_travel_is_empty_and_not_zero(kind):
    names = {"inner_lr": 0.1, "hessian_lr": 0.1, "outer_lr": 0.05, "local_steps": 1, "inner_rounds": 1}
    algorithm = kind(**{name: value for name, value in names.items() if name in kind.__dataclass_fields__})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = fb.solve(PROBLEM, DATA, algorithm, X, Y, 3, key=KEY).history
    assert np.isnan(history.column("vector_residual")).all()
    assert np.isnan(history.column("lower_gradient_norm")[1:]).all() == (kind is fb.FedBiOAccLocal)
    assert not np.isnan(history.column("hypergradient_norm")[1:]).any()


def test_a_resumed_run_tells_the_same(tmp_path):
    steps = (0.3, 0.02, 0.3)
    whole, told = run(fb.Lockstep, steps, 300, evaluate_every=1)
    run(fb.Lockstep, steps, 160, callbacks=[Checkpoint(tmp_path)], evaluate_every=1)
    resumed, again = run(fb.Lockstep, steps, 300, resume=tmp_path, evaluate_every=1)
    assert told == again and len(told) == 1
    np.testing.assert_array_equal(whole.history.column("turn"), resumed.history.column("turn"))


def test_a_long_run_is_remembered_whole():
    """Sums of iterations: a swing of thousands of them is seen, noise of as many is not."""
    trail, many = Trail(), 6000
    assert swing_in(trail, np.cos(np.arange(many) * 2 * np.pi / 1500)).half == pytest.approx(750, rel=0.05)
    assert swing_in(Trail(), np.random.default_rng(3).normal(size=many)) is None
    assert swing_in(Trail(), np.exp(-np.arange(many) / 2000)) is None
    assert swing_in(Trail(), (-1.0) ** np.arange(many)).half == 1


def swing_in(trail, series):
    sketch = np.zeros((len(series), 32))
    sketch[:, 3] = series
    seen = Seen({"x": np.ones(len(series))}, {"x": np.abs(series) + 1e-9}, sketch)
    trail.add(seen, len(series), 1e-16)
    return trail.swing()
