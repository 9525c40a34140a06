"""Ridge tuning on badly scaled columns: the closed forms in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.errors import InputError
from fedbilevel.tasks import scaled
from fedbilevel.tasks.scaled import SCALES
from helpers.differences import check_hypergradient, moved


def means(task, level):
    """(a'a, a't): means over clients of the means over a client's rows."""
    each = [getattr(task.data, level).alone(i).rows for i in range(task.data.clients)]
    rows = [(np.asarray(own["a"]), np.asarray(own["target"])) for own in each]
    return np.mean([a.T @ a / len(a) for a, _ in rows], 0), np.mean([a.T @ t / len(a) for a, t in rows], 0)


@pytest.mark.parametrize("clients", [3, None])
def test_the_closed_form_is_the_references(clients):
    task = scaled(seed=3, clients=clients)
    x = moved(task.x, size=1.0)
    (G, b), (G_out, b_out) = means(task, "inner"), means(task, "outer")
    penalty = np.exp(np.asarray(x))
    H = G + np.diag(penalty)
    y = np.linalg.solve(H, b)
    v = np.linalg.solve(H, G_out @ y - b_out)
    slope = -penalty * y * v
    problem, data = task.problem, task.data
    np.testing.assert_allclose(fb.reference.solution(problem, data, x, task.y), y, rtol=1e-8)
    np.testing.assert_allclose(fb.reference.hypergradient(problem, data, x, task.y), slope, rtol=1e-7, atol=1e-12)
    assert float(task.metrics["stationarity"](x, task.y)) == pytest.approx(np.sum(slope**2), rel=1e-7)
    assert float(task.metrics["value"](x, task.y)) == pytest.approx(float(fb.reference.value(problem, data, x, task.y)))
    assert float(task.metrics["distance"](x, y)) < 1e-12
    assert float(task.metrics["distance"](x, y + 0.5)) == pytest.approx(0.25 * len(y))


def test_long_steps_do_not_end_the_metrics():
    """Where the reference refuses, in 32 bits from a condition number of 1e5 on."""
    with jax.enable_x64(False):
        task = scaled(seed=3)
        far = jnp.array([60.0, -60.0] * 6)
        with pytest.raises(fb.RunError):
            fb.reference.value(task.problem, task.data, far, task.y)
        none = jnp.full(12, 900.0)  # every column is switched off, and f is half the mean square of the targets
        half = 0.5 * np.mean(np.asarray(task.data.outer.rows["target"]) ** 2)
        assert float(task.metrics["value"](none, task.y)) == pytest.approx(half, rel=1e-5)
        values = [float(task.metrics[name](far, task.y)) for name in ("value", "stationarity", "distance")]
        assert np.isfinite(values).all()


def test_the_hypergradient_is_the_derivative_of_the_value():
    task = scaled(seed=1, clients=3)
    check_hypergradient(task.problem, task.data, moved(task.x, size=1.0), task.y, least=1e-6)


def test_columns_lie_between_a_tenth_and_twenty():
    rows = scaled(seed=0).data.outer.rows["a"]
    np.testing.assert_allclose(np.std(rows, axis=0), SCALES, rtol=0.2)
    assert SCALES[0] == pytest.approx(0.1) and SCALES[-1] == pytest.approx(20)
    curvature = np.linalg.eigvalsh(means(scaled(seed=0), "inner")[0])
    assert curvature[-1] / curvature[0] > 1e4


def test_the_test_error_is_a_mean_of_squares():
    task = scaled(seed=0)
    error = float(task.metrics["test_error"](task.x, task.y))  # of y = 0: noise, and six columns of effect 1/2
    assert error == pytest.approx(1 + 6 * (0.5**2 + 0.1**2), rel=0.15)
    with pytest.raises(InputError, match="makes its own clients"):
        scaled(data_dir="/")
