"""A run that blows up names the step to lower, and keeps all there was: iterates up to the last finite iteration.

Which of the three steps is too large follows from the curvatures: the lower map for inner_lr, 2 / L for hessian_lr; what
is left is outer_lr.
"""

from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np
import pytest

import fedbilevel as fb
from helpers.plain import plain
from helpers.quadratic import DY, flat, quadratic

Q0 = quadratic()
LARGEST = np.linalg.eigvalsh(Q0.hessians(Q0.t)).max()
L_G = np.linalg.eigvalsh(Q0.hessians(Q0.t).mean(0)).max()
STEPS = 2
GOOD = {"inner_lr": 0.1, "hessian_lr": 0.1, "outer_lr": 0.02}
SHAPE = {"inner_rounds": 3, "local_steps": STEPS, "truncation": "full"}
KINDS = [fb.AggITD, fb.FedNest, fb.FedNestSGD, fb.LFedNest, fb.LFedNestSVRG]
LOCAL = [fb.LocalBSGVRM, fb.AdaFBiO]
AT_ONCE = [fb.Lockstep, fb.SimFBO, fb.MemFBO, fb.FedBiOAcc, fb.FedBiOAccLocal, fb.FedMSA, *LOCAL, fb.FedF2SA]


def run(kind, iterations=2000, q=Q0, engine=None, **steps):
    terms = {} if kind is fb.AggITD else {"neumann_terms": 5}
    algorithm = kind(**{**SHAPE, **terms, **GOOD, **steps})
    return fb.solve(q.problem, q.data, algorithm, q.x, q.y, iterations, key=jax.random.key(0), engine=engine)


def lower_growth(kind, lr):
    """What one turn multiplies the lower level's error by."""
    corrected = kind in (fb.AggITD, fb.FedNest, fb.LFedNestSVRG)
    matrix = Q0.corrected_map(Q0.t, lr, STEPS) if corrected else Q0.local_map(Q0.t, lr, STEPS)[0]
    return np.abs(np.linalg.eigvals(matrix)).max()


def series_growth(kind, lr):
    """What one factor multiplies the vector by: of the mean Hessian, or of the worst client's own."""
    hessians = Q0.hessians(Q0.t)
    hessians = hessians if kind in (fb.LFedNest, fb.LFedNestSVRG) else hessians.mean(0)
    return np.abs(np.linalg.eigvalsh(np.eye(DY) - lr * hessians)).max()


def check_report(failure, kind, name, value):
    """The message names the algorithm, the iteration and the step (and no other); the result is what was finite."""
    text, result = str(failure.value), failure.value.result
    iteration = int(re.search(r"in iteration (\d+)", text)[1])
    assert text.startswith(kind.__name__) and "\n" not in text
    assert re.findall(r"lower (\w+) \(now ([^)]*)\)", text) == [(name, f"{value:g}")], text
    assert result.iteration == iteration - 1 == result.history[-1]["iteration"]
    assert np.isfinite(flat((result.x, result.y))).all()
    assert all(np.isfinite(row["hypergradient_norm"]) for row in result.history[1:])
    assert result.history[-1]["rounds"] <= result.protocol.rounds_most * result.iteration


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GOOD)
def test_the_step_that_is_too_large_is_named(kind, name):
    value = {"inner_lr": 4.0, "hessian_lr": 5.0, "outer_lr": 30.0}[name]
    steps = {**GOOD, name: value}
    grows = lower_growth(kind, steps["inner_lr"]), series_growth(kind, steps["hessian_lr"])
    assert (grows[0] > 1, grows[1] > 1) == (name == "inner_lr", name == "hessian_lr")
    with pytest.raises(fb.Diverged) as failure:
        run(kind, **{name: value})
    check_report(failure, kind, name, value)


@pytest.mark.parametrize("kind", KINDS)
def test_good_steps_do_not_diverge(kind):
    result = run(kind, 300)
    assert result.iteration == 300 and np.isfinite(flat((result.x, result.y))).all()


PAIRS = [(name, kind) for kind in AT_ONCE for name in GOOD if name in kind.__dataclass_fields__]


@pytest.mark.parametrize(
    ("name", "kind"),
    [pair for pair in PAIRS if pair != ("inner_lr", fb.AdaFBiO)],  # its lower steps are relative: they do not blow up
)
def test_a_step_is_named_where_there_are_no_rounds_of_the_lower_level_alone(name, kind):
    value = {"inner_lr": 4.0, "hessian_lr": 5.0, "outer_lr": 30.0}[name]
    algorithm = kind(**{field: v for field, v in GOOD.items() if field in kind.__dataclass_fields__}, local_steps=STEPS)
    algorithm = dataclasses.replace(algorithm, **{name: value})
    with pytest.raises(fb.Diverged) as failure:
        fb.solve(Q0.problem, Q0.data, algorithm, Q0.x, Q0.y, 2000, key=jax.random.key(0))
    text = str(failure.value)
    assert text.startswith(kind.__name__) and f"lower {name} (now {value:g})" in text


@pytest.mark.parametrize("outer_lr", [1e-30, 0.02])
@pytest.mark.parametrize("kind", [fb.AggITD, fb.LFedNest])
def test_a_lower_level_that_blows_up_slowly_is_named_too(kind, outer_lr):
    """A few per cent a turn: many iterations pass before anything is seen, unless x moves and hastens it."""
    value = next(lr for lr in np.linspace(0.3, 4, 400) if lower_growth(kind, lr) > 1.05)
    assert lower_growth(kind, value) < 1.1
    with pytest.raises(fb.Diverged) as failure:
        run(kind, inner_lr=float(value), outer_lr=outer_lr)
    assert outer_lr > 1e-3 or failure.value.result.iteration > 30
    check_report(failure, kind, "inner_lr", value)


def test_loopback_says_the_same():
    small = quadratic(clients=2, sizes=((2, 2),))  # equal sizes: every size is compiled anew by Loopback
    with pytest.raises(fb.Diverged) as simulated:
        run(fb.LFedNestSVRG, q=small, inner_lr=4.0)
    with pytest.raises(fb.Diverged) as looped:
        run(fb.LFedNestSVRG, q=small, inner_lr=4.0, engine=fb.Loopback())
    check_report(looped, fb.LFedNestSVRG, "inner_lr", 4.0)
    assert str(looped.value) == str(simulated.value)
    np.testing.assert_allclose(flat(looped.value.result.x), flat(simulated.value.result.x), rtol=1e-9)


def test_an_estimate_that_is_not_finite_is_not_returned_silently():
    algorithm = plain(fb.AggITD, inner_rounds=2000, inner_lr=30.0, local_steps=STEPS, truncation="full")
    with pytest.raises(fb.Diverged, match="inner_lr"):
        fb.estimate_hypergradient(Q0.problem, Q0.data, algorithm, Q0.x, Q0.y, key=jax.random.key(0))


class Half(fb.Algorithm):
    """Multiplies y by ten thousand an iteration; in float16 it is infinite in the second."""

    def step(self, fed, state):
        return fb.State(state.x, fed.average(self.grow, state.y)), {}

    def grow(self, client, y):
        return 100 * (100 * y)


def test_infinity_in_half_precision_is_seen():
    loss = lambda x, y, e: (x * y * e) ** 2
    rows = [np.ones(2, np.float16)] * 2
    one = np.float16(1)
    with pytest.raises(fb.Diverged) as failure:
        fb.solve(fb.Problem(loss, loss), fb.FederatedData.stack(rows, rows), Half(), one, one, 5, key=jax.random.key(0))
    assert float(failure.value.result.y) == 10_000
