"""The references are right or refused: ill-conditioned, indefinite, in few bits, and where part of y stands still."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fedbilevel as fb
from fedbilevel import reference

DIM, DX = 8, 3
B = np.random.default_rng(7).normal(size=(DIM, DX))


# g = y'Hy / 2 - (c + Bx)'y, f = |y - t|^2 / 2: v* = H^{-1} (y - t), grad Phi = B'v; all of it comes with the rows


def inner(x, y, e):
    return 0.5 * y @ e["H"] @ y - (e["c"] + e["B"] @ x) @ y


def outer(x, y, e):
    return 0.5 * jnp.sum((y - e["t"]) ** 2)


PROBLEM = fb.Problem(inner, outer)


class Case:
    """A Hessian with these eigenvalues, in a basis of its own; y* and the hypergradient at x = 0 in float64."""

    def __init__(self, eigenvalues, dtype=np.float64, rotated=True, gap=None):
        draw = np.random.default_rng(len(eigenvalues))
        basis = np.linalg.qr(draw.normal(size=(DIM, DIM)))[0] if rotated else np.eye(DIM)
        H = (basis * eigenvalues) @ basis.T
        self.solution, self.dtype = draw.normal(size=DIM), dtype
        target = self.solution - (basis @ gap if gap is not None else draw.normal(size=DIM))
        self.hypergradient = B.T @ np.linalg.solve(H, self.solution - target)
        each = lambda shift: {"H": H, "c": H @ self.solution + shift, "t": target, "B": B}
        rows = [jax.tree.map(lambda a: a[None].astype(dtype), each(shift)) for shift in (-0.1, 0.0, 0.1)]
        self.data = fb.FederatedData.stack(rows, rows)
        self.x, self.y = jnp.zeros(DX, dtype), jnp.zeros(DIM, dtype)

    def error(self, method, **options):
        """Relative; at y* itself where that is not solved for."""
        y = self.y if options.get("solve_inner", True) else jnp.asarray(self.solution, self.dtype)
        h = reference.hypergradient(PROBLEM, self.data, self.x, y, method=method, **options)
        return np.linalg.norm(np.asarray(h) - self.hypergradient) / np.linalg.norm(self.hypergradient)


def small(value, largest=1.0):
    return np.concatenate([[value], np.geomspace(0.1, largest, DIM - 1)])


@pytest.mark.slow
@pytest.mark.parametrize("value", [1e-8, 1e-7])
def test_a_small_residual_along_a_small_eigenvalue_is_an_error(value):
    """The part of d_y f along it is far below the accuracy of residuals, and v's part is not."""
    gap = np.concatenate([[0.03 * value], np.ones(DIM - 1)])
    case = Case(small(value), gap=gap)
    for method in ("exact", "cg"):
        assert case.error(method, solve_inner=False) < 1e-6
        right_or_refused(case, method)  # y* is not known well enough, for the same reason
    for inside in (True, False):
        with pytest.raises(fb.RunError, match=r"error of the result about .*use 'cg'"):
            case.error("neumann", solve_inner=inside)
    assert case.error("neumann", terms=2_000) > 1e-4  # a truncation that is asked for is given


def right_or_refused(case, method, accuracy=1e-6):
    try:
        assert case.error(method) < accuracy
    except fb.RunError as error:
        assert "error of the result about" in str(error)


@pytest.mark.slow
def test_series_that_converge_are_right():
    case = Case(small(2e-2))
    for method in ("neumann", "unrolled"):
        assert case.error(method) < 1e-6


@pytest.mark.slow
def test_conjugate_gradients_are_right_where_they_need_more_steps_than_dimensions():
    case = Case(np.geomspace(1e-9, 1, DIM))
    assert case.error("cg") < 1e-5
    assert case.error("cg", solve_inner=False) < 1e-5


@pytest.mark.parametrize("method", ["exact", "cg", "neumann"])
@pytest.mark.parametrize("condition", [1e2, 5e4])
def test_32_bits_are_right_or_refused(method, condition):
    case = Case(np.geomspace(1 / condition, 1, DIM), np.float32)
    right_or_refused(case, method, 4e-3)
    if condition < 1e4:
        assert case.error(method) < 1e-5


@pytest.mark.parametrize("condition", [3e5, 1e7, 1e9])
def test_32_bits_are_told_to_be_too_few(condition):
    case = Case(np.geomspace(1 / condition, 1, DIM), np.float32)
    with pytest.raises(fb.RunError, match="use 64 bits"):
        reference.solution(PROBLEM, case.data, case.x, case.y)
    for method in ("exact", "cg"):
        with pytest.raises(fb.RunError, match="use 64 bits") as refused:
            case.error(method, solve_inner=False)
        assert "singular" not in str(refused.value)
    assert Case(np.geomspace(1 / condition, 1, DIM)).error("exact") < 1e-5


def test_a_singular_hessian_is_called_so_in_64_bits():
    with pytest.raises(fb.RunError, match="is H singular"):
        Case(np.concatenate([[1e-17], np.ones(DIM - 1)])).error("exact", solve_inner=False)


def test_no_minimum_is_a_warning():
    """H has curvatures of both signs: the formula has a value at any y, which is no hypergradient."""
    case = Case(np.linspace(-1, 2, DIM) + 0.05)
    for method in ("exact", "cg"):
        with pytest.warns(fb.errors.FedbilevelWarning, match=r"curvature of g goes from -0\.95 to 2"):
            assert case.error(method, solve_inner=False) < 1e-8
    with pytest.raises(fb.RunError, match=r"goes from -0\.95 to 2"):
        case.error("neumann", solve_inner=False)
    Case(small(0.1)).error("exact", solve_inner=False)  # and no warning where there is one


@pytest.mark.slow
def test_extreme_curvatures_without_the_dense_hessian():
    matrix = np.diag(np.concatenate([[-3.0, 1e-3], np.linspace(1, 2, 150), [7.0]]))
    for dtype, accuracy in ((jnp.float64, 1e-8), (jnp.float32, 1e-4)):
        hessian = jnp.asarray(matrix, dtype)
        smallest, largest = reference.linear.lanczos(lambda v, H=hessian: H @ v, len(matrix), dtype)
        np.testing.assert_allclose([smallest, largest], [-3, 7], rtol=accuracy)
    same = jnp.eye(12) * 2.5  # every vector ends a Krylov space
    np.testing.assert_allclose(reference.linear.lanczos(lambda v: same @ v, 12, jnp.float64), [2.5, 2.5], rtol=1e-12)


# Half precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "rows"),
    [
        (jnp.bfloat16, "half"),
        pytest.param(jnp.float16, "half", marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, "float32", marks=pytest.mark.slow),
    ],
)
def test_half_precision_is_computed_in_32_bits(dtype, rows):
    case = Case(small(0.1), np.float32)
    cast = lambda tree, a, b: jax.tree.map(lambda leaf: leaf.astype(b) if leaf.dtype == a else leaf, tree)
    data = cast(case.data, np.float32, dtype) if rows == "half" else case.data
    given = data, case.x.astype(dtype), case.y.astype(dtype)
    wide = cast(data, dtype, np.float32), case.x, case.y
    close = {"rtol": float(jnp.finfo(dtype).eps), "atol": 1e-3}
    functions = {
        "hypergradient": reference.hypergradient,
        "unrolled": lambda *a: reference.hypergradient(*a, method="unrolled", terms=50),
        "solution": reference.solution,
        "hessian": reference.hessian,
        "value": reference.value,
        "inner_value": reference.inner_value,
        "outer_value": reference.outer_value,
        "stationarity": reference.stationarity,
    }
    for name, function in functions.items():
        out, expected = function(PROBLEM, *given), function(PROBLEM, *wide)
        assert out.dtype == dtype, name
        np.testing.assert_allclose(np.asarray(out, np.float64), expected, **close)


def test_half_precision_that_the_result_does_not_fit_is_refused():
    case = Case(small(0.1), np.float32)
    data = jax.tree.map(lambda a: jnp.asarray(1e4, a.dtype) * a if a.shape == (3, DIM) else a, case.data)
    with pytest.raises(fb.RunError, match="does not fit float16"):
        reference.stationarity(PROBLEM, data, case.x.astype(jnp.float16), case.y.astype(jnp.float16))


# Leaves of y that stand still -----------------------------------------------------------------------------------------

still = jax.lax.stop_gradient
X0 = {"a": jnp.asarray([0.3, -0.2]), "k": jnp.asarray(0.5)}
Y0 = {"frozen": jnp.asarray([[1.0, 0.5], [-0.5, 1.0]]), "w": jnp.asarray([0.1, 0.2]), "unused": jnp.ones(3)}
NAMES = r"y\['frozen'\], y\['unused'\]"


def frozen_inner(x, y, e):
    seen = jnp.tanh(still(y["frozen"]) @ e["a"] * x["k"])
    return 0.5 * (seen @ y["w"] - e["b"]) ** 2 + 0.5 * jnp.exp(x["a"]) @ y["w"] ** 2


def frozen_outer(x, y, e):
    seen = jnp.tanh(y["frozen"] @ e["a"])
    return 0.5 * (seen @ y["w"] - e["b"]) ** 2 + 0.1 * jnp.sum(y["unused"]) * y["w"][0] + 0.1 * x["k"] ** 2


class Bringing(fb.Problem):
    """Oracles of its own, which answer with zeros for what stands still."""

    def inner_gradient(self, x, y, rows):
        return super().inner_gradient(x, y, rows)

    def hessian_vector(self, x, y, v, rows):
        return still(super().hessian_vector(x, y, v, rows))


@pytest.fixture(scope="module")
def frozen_data():
    draw = np.random.default_rng(5)
    client = lambda i, n: {"a": draw.normal(size=(n, 2)) + 0.3 * i, "b": draw.normal(size=n) + i}
    return fb.FederatedData.stack([client(i, 3 + i) for i in range(3)], [client(i, 5 - i) for i in range(3)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [fb.Problem, Bringing])
def test_leaves_that_stand_still_stay_at_their_start(frozen_data, kind):
    given = kind(frozen_inner, frozen_outer), frozen_data
    origin, unravel = ravel_pytree(X0)
    with pytest.warns(fb.errors.FedbilevelWarning, match=NAMES) as warned:
        y = reference.solution(*given, X0, Y0)
    assert len(warned) == 1 and warned[0].filename == __file__
    assert (y["frozen"] == Y0["frozen"]).all() and (y["unused"] == 1).all()

    def phi(shift):
        with pytest.warns(fb.errors.FedbilevelWarning):
            return float(reference.value(*given, unravel(origin + shift), Y0))

    width = 1e-4
    expected = np.array([(phi(width * e) - phi(-width * e)) / (2 * width) for e in np.eye(3)])
    for method in reference.METHODS if kind is fb.Problem else ("exact",):
        with pytest.warns(fb.errors.FedbilevelWarning, match=NAMES) as warned:
            h = reference.hypergradient(*given, X0, Y0, method=method)
        assert len(warned) == 1
        np.testing.assert_allclose(ravel_pytree(h)[0], expected, rtol=1e-6)
    with pytest.warns(fb.errors.FedbilevelWarning, match=NAMES):
        square = reference.stationarity(*given, X0, Y0)
    np.testing.assert_allclose(square, expected @ expected, rtol=1e-6)


def test_a_warm_call_warns_again(frozen_data):
    for _ in range(2):
        with pytest.warns(fb.errors.FedbilevelWarning, match=NAMES):
            reference.solution(fb.Problem(frozen_inner, frozen_outer), frozen_data, X0, Y0)


def test_a_loss_without_y_is_refused(frozen_data):
    problem = fb.Problem(lambda x, y, e: x["k"] * e["b"] + still(y["w"][0]), frozen_outer)
    for call in (reference.solution, reference.hypergradient, reference.value):
        with pytest.raises(fb.InputError, match="does not depend on y"):
            call(problem, frozen_data, X0, Y0)


def test_a_leaf_that_has_no_curvature_is_no_leaf_that_stands_still(frozen_data):
    loss = lambda x, y, e: frozen_inner(x, y, e) + jnp.sum(y["unused"])
    with (
        pytest.warns(fb.errors.FedbilevelWarning, match=r"y\['frozen'\]: it is left"),
        pytest.raises(fb.RunError, match="regulariser"),
    ):
        reference.solution(fb.Problem(loss, frozen_outer), frozen_data, X0, Y0)
