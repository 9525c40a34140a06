"""The centralised references against closed forms in numpy, finite differences, and each other (float64)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from fedbilevel import reference
from fedbilevel.data import FederatedData
from fedbilevel.errors import InputError, RunError
from fedbilevel.problem import Problem

MU, RHO = 0.3, 0.2
INNER_SIZES, OUTER_SIZES = (4, 9, 1, 17, 6, 3, 11, 2, 5, 8), (2, 3, 12, 1, 5, 4, 2, 7, 3, 1)  # not a multiple of eight
X = {"k": jnp.asarray(0.7), "u": jnp.asarray([0.4, -1.1])}
Y = {"head": {"w": jnp.asarray([1.0, -2.0, 0.5])}, "intercept": jnp.asarray(3.0)}


# A quadratic whose rows are (a, b, t): g = (a'y - b'x - t)^2 / 2 + MU |y|^2 / 2, f = (a'y - t)^2 / 2 + RHO |x|^2 / 2


def residual(y, e):
    return jnp.sum(e["a"][:3] * y["head"]["w"]) + e["a"][3] * y["intercept"] - e["t"]


def inner(x, y, e):
    shift = e["b"][0] * x["k"] + jnp.sum(e["b"][1:] * x["u"])
    return 0.5 * (residual(y, e) - shift) ** 2 + 0.5 * MU * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(y))


def outer(x, y, e):
    return 0.5 * residual(y, e) ** 2 + 0.5 * RHO * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x))


def rows(rng, client, count):
    spread = 0.5 + rng.random(4) * (1 + client % 3)  # every client curves its own way
    return {
        "a": rng.normal(size=(count, 4)) * spread,
        "b": rng.normal(size=(count, 3)),
        "t": client + rng.random(count),
    }


def clients():
    rng = np.random.default_rng(0)
    return tuple([rows(rng, i, n) for i, n in enumerate(sizes)] for sizes in (INNER_SIZES, OUTER_SIZES))


class Closed:
    """All of it in numpy, from pooled rows with a weight each; vectors ordered as `ravel_pytree` orders X and Y."""

    def __init__(self, inner, outer, inner_weights, outer_weights):
        pool = lambda clients, name: np.concatenate([c[name] for c in clients]).astype(float)
        spread = lambda p, sizes: np.repeat(np.asarray(p) / sizes, sizes)
        self.w = spread(inner_weights, [len(c["t"]) for c in inner])
        self.v = spread(outer_weights, [len(c["t"]) for c in outer])
        (self.a, self.b, self.t), (self.c, self.s) = (pool(inner, n) for n in "abt"), (pool(outer, n) for n in "at")
        self.x = np.array([0.7, 0.4, -1.1])
        self.H = (self.a.T * self.w) @ self.a + MU * np.eye(4)
        self.J = -(self.b.T * self.w) @ self.a  # (dx, dy)
        self.y = np.linalg.solve(self.H, self.a.T @ (self.w * (self.b @ self.x + self.t)))
        self.largest = np.linalg.eigvalsh(self.H)[-1]

    def d_y(self, y):
        return self.c.T @ (self.v * (self.c @ y - self.s))

    def assemble(self, v):
        return RHO * self.x - self.J @ v

    def hypergradient(self):
        return self.assemble(np.linalg.solve(self.H, self.d_y(self.y)))

    def series(self, terms, step, b):
        powers = [b]
        for _ in range(terms - 1):
            powers.append(powers[-1] - step * self.H @ powers[-1])
        return step * sum(powers)

    def value(self):
        return 0.5 * self.v @ (self.c @ self.y - self.s) ** 2 + 0.5 * RHO * self.x @ self.x


@pytest.fixture(scope="module")
def quadratic():
    one, other = clients()
    m = len(INNER_SIZES)
    closed = Closed(one, other, np.full(m, 1 / m), np.full(m, 1 / m))
    # weights that are given, though equal, make one program of this and of weights="rows"; others leave them out
    return Problem(inner, outer), FederatedData.stack(one, other, weights=[1.0] * m), closed


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def error(one, other):
    return np.linalg.norm(flat(one) - other) / np.linalg.norm(other)


def test_values_solution_and_hessian_equal_the_closed_form(quadratic):
    problem, data, closed = quadratic
    y = reference.solution(problem, data, X, Y)
    assert jax.tree.structure(y) == jax.tree.structure(Y)
    assert error(y, closed.y) < 1e-13
    assert np.linalg.norm(closed.H @ flat(y) - closed.H @ closed.y) < 1e-12
    assert np.allclose(reference.hessian(problem, data, X, Y), closed.H, rtol=1e-13, atol=1e-13)
    assert np.isclose(reference.value(problem, data, X, Y), closed.value(), rtol=1e-13)
    assert np.isclose(reference.outer_value(problem, data, X, y), closed.value(), rtol=1e-13)
    start = flat(Y)
    g = 0.5 * closed.w @ (closed.a @ start - closed.b @ closed.x - closed.t) ** 2 + 0.5 * MU * start @ start
    assert np.isclose(reference.inner_value(problem, data, X, Y), g, rtol=1e-13)
    norm2 = np.sum(closed.hypergradient() ** 2)
    assert np.isclose(reference.stationarity(problem, data, X, Y), norm2, rtol=1e-10)


@pytest.mark.parametrize(
    ("method", "terms", "tolerance"), [("exact", 0, 1e-10), ("cg", 0, 1e-10), ("neumann", 400, 1e-9)]
)
def test_methods_find_the_hypergradient(quadratic, method, terms, tolerance):
    """ "unrolled" does too: below, where few of its steps do not, and where Hessians are not dense."""
    problem, data, closed = quadratic
    options = {"terms": terms, "step": 1 / closed.largest} if terms else {}
    h = reference.hypergradient(problem, data, X, Y, method=method, **options)
    assert jax.tree.structure(h) == jax.tree.structure(X)
    assert error(h, closed.hypergradient()) < tolerance


@pytest.mark.parametrize("terms", [1, 4])
def test_a_truncated_series_is_the_truncated_series(quadratic, terms):
    problem, data, closed = quadratic
    step = 0.9 / closed.largest
    h = reference.hypergradient(problem, data, X, Y, method="neumann", terms=terms, step=step)
    assert error(h, closed.assemble(closed.series(terms, step, closed.d_y(closed.y)))) < 1e-12
    assert error(h, closed.assemble(closed.series(terms + 1, step, closed.d_y(closed.y)))) > 1e-3  # an off-by-one
    assert error(h, closed.hypergradient()) > 1e-2


def test_few_unrolled_steps_are_differentiated_as_they_are(quadratic):
    problem, data, closed = quadratic
    terms, step = 4, 0.9 / closed.largest
    h = reference.hypergradient(problem, data, X, Y, method="unrolled", terms=terms, step=step)
    power = np.linalg.matrix_power(np.eye(4) - step * closed.H, terms)
    end = closed.y + power @ (flat(Y) - closed.y)
    assert error(h, closed.assemble(closed.series(terms, step, closed.d_y(end)))) < 1e-12
    assert error(h, closed.assemble(closed.series(terms + 1, step, closed.d_y(end)))) > 1e-3  # an off-by-one
    assert error(h, closed.hypergradient()) > 1e-2


def test_the_given_y_can_be_taken_as_it_is(quadratic):
    problem, data, closed = quadratic
    expected = closed.assemble(np.linalg.solve(closed.H, closed.d_y(flat(Y))))
    assert error(reference.hypergradient(problem, data, X, Y, solve_inner=False), expected) < 1e-12
    assert error(reference.hypergradient(problem, data, X, Y), expected) > 0.1


def test_it_is_not_the_mean_of_the_clients_own_hypergradients(quadratic):
    problem, data, _ = quadratic
    one, other = clients()
    own = [Closed([i], [o], [1.0], [1.0]).hypergradient() for i, o in zip(one, other, strict=True)]
    h = reference.hypergradient(problem, data, X, Y)
    assert error(h, np.mean(own, axis=0)) > 0.1
    alike = Closed(one[:1] * 3, other[:1] * 3, np.full(3, 1 / 3), np.full(3, 1 / 3))
    assert error(alike.hypergradient(), own[0]) < 1e-12  # without heterogeneity there is no difference


def test_weights_by_rows_are_the_pooled_data(quadratic):
    problem, _, uniform = quadratic
    one, other = clients()
    pooled = Closed(one, other, np.array(INNER_SIZES) / sum(INNER_SIZES), np.array(OUTER_SIZES) / sum(OUTER_SIZES))
    assert np.allclose(pooled.w, 1 / sum(INNER_SIZES)) and np.allclose(pooled.v, 1 / sum(OUTER_SIZES))
    data = FederatedData.stack(one, other, weights="rows")
    h = reference.hypergradient(problem, data, X, Y)
    assert error(h, pooled.hypergradient()) < 1e-10
    assert error(h, uniform.hypergradient()) > 1e-2
    assert np.isclose(reference.value(problem, data, X, Y), pooled.value(), rtol=1e-12)


class Opaque(Problem):
    """Oracles that answer rightly and have no derivatives (those are zero): as of a model in another framework."""

    def inner_value(self, *args):
        return jax.lax.stop_gradient(super().inner_value(*args))

    def inner_gradient(self, *args):
        return jax.lax.stop_gradient(Problem(inner, outer).inner_gradient(*args))

    def hessian_vector(self, *args):
        return jax.lax.stop_gradient(Problem(inner, outer).hessian_vector(*args))

    def cross_vector(self, *args):
        return jax.lax.stop_gradient(Problem(inner, outer).cross_vector(*args))

    def outer_gradients(self, *args):
        return jax.lax.stop_gradient(Problem(inner, outer).outer_gradients(*args))


def test_only_the_oracles_are_used_and_no_dense_hessian_beyond_the_limit(quadratic, monkeypatch):
    _, data, closed = quadratic
    problem = Opaque(inner, outer)  # another problem is compiled anew, under the new limit
    monkeypatch.setattr(reference, "DENSE_LIMIT", 0)
    monkeypatch.setattr(reference._Lower, "hessian", None)
    for method in ("neumann", "unrolled"):  # their steps are from power iteration then, y* by conjugate gradients
        h = reference.hypergradient(problem, data, X, Y, method=method)
        assert error(h, closed.hypergradient()) < 1e-9


class Regularisation:
    """Tuning one penalty for each weight of a logistic model: no direct part, no closed form."""

    def __init__(self, scale=1.0):
        rng = np.random.default_rng(1)

        def client(i, n):
            row = scale * (rng.normal(size=(n, 4)) + 0.3 * i)
            return {"row": row, "label": np.sign(row @ [1.0, -1.0, 0.5, 0.0] + rng.normal(size=n))}

        self.data = FederatedData.stack(
            [client(i, 5 + 3 * i) for i in range(4)], [client(i, 9 - 2 * i) for i in range(4)]
        )
        self.x = {"w": jnp.asarray([-1.0, -3.0, 0.0, -6.0]), "b": jnp.asarray(-4.0)}
        self.y = {"w": jnp.zeros(4), "b": jnp.zeros(())}

    traces = 0

    @staticmethod
    def outer(x, y, e):
        return jax.nn.softplus(-e["label"] * (jnp.sum(e["row"] * y["w"]) + y["b"]))

    @staticmethod
    def inner(x, y, e):
        Regularisation.traces += 1
        penalty = 0.5 * (jnp.sum(jnp.exp(x["w"]) * y["w"] ** 2) + jnp.exp(x["b"]) * y["b"] ** 2)
        return Regularisation.outer(x, y, e) + penalty

    problem = Problem(inner.__func__, outer.__func__)


def test_hypergradient_equals_finite_differences_of_phi():
    task = Regularisation()
    given = task.problem, task.data
    h = reference.hypergradient(*given, task.x, task.y)
    origin, unravel = ravel_pytree(task.x)
    reference.value(*given, task.x, task.y)
    compiled = Regularisation.traces

    def phi(shift):
        return float(reference.value(*given, unravel(origin + shift), task.y))

    width = 1e-4
    difference = np.array([(phi(width * e) - phi(-width * e)) / (2 * width) for e in np.eye(5)])
    assert error(h, difference) < 1e-6
    assert np.linalg.norm(difference) > 1e-3
    assert Regularisation.traces == compiled + 10  # each call looks at the loss once; nothing is compiled again
    elsewhere = reference.hypergradient(*given, task.x, task.y, solve_inner=False)
    assert error(elsewhere, difference) > 0.1  # at y = 0 the formula is another number


def test_a_far_start_leads_to_the_same_solution():
    """Where the loss is saturated and almost unpenalised, Newton steps alone get stuck: L-BFGS has to come first."""
    task = Regularisation(scale=100.0)
    x = jax.tree.map(lambda leaf: jnp.full_like(leaf, -14.0), task.x)
    far = {"w": jnp.asarray([-10.0, 20.0, 5.0, -10.0]), "b": jnp.asarray(10.0)}
    near = reference.solution(task.problem, task.data, x, task.y)
    assert error(reference.solution(task.problem, task.data, x, far), flat(near)) < 1e-9


def test_unusable_options_are_refused_in_a_sentence(quadratic):
    problem, data, closed = quadratic
    call = lambda **options: reference.hypergradient(problem, data, X, Y, **options)
    with pytest.raises(InputError, match="did you mean 'exact'"):
        call(method="exat")
    with pytest.raises(InputError, match="belong to 'neumann' and 'unrolled', not to 'cg'"):
        call(method="cg", terms=3)
    with pytest.raises(InputError, match="positive whole number"):
        call(method="neumann", terms=0)
    with pytest.raises(InputError, match="positive number"):
        call(method="neumann", step=-1.0)
    with pytest.raises(RunError, match="keep step= below 2 / L"):
        call(method="neumann", terms=4, step=2.5 / closed.largest)
    with pytest.raises(InputError, match="NaN or infinite"):
        reference.solution(problem, data, X, jax.tree.map(lambda leaf: leaf * jnp.nan, Y))


class Model(eqx.Module):
    weight: jax.Array
    calls: jax.Array
    activation: object


def identity(z):
    return z


def model(value):
    return Model(jnp.full(3, value, jnp.float32), jnp.asarray(5), identity)


def upper(curvature, slope, decay=0.0):
    numbers = {"c": curvature, "s": slope, "decay": decay}
    return {"model": model(1.5)} | {name: jnp.asarray(number, jnp.float32) for name, number in numbers.items()}


@pytest.fixture(scope="module")
def modules():
    """g = c |y - x|^2 / 2 + sum(s y + decay exp(-y)); without decay y* = x - s / c.

    f = |y - e|^2 / 2, where e is 3 in the mean over clients.
    """

    def gap(x, y):
        return y.activation(y.weight) - x["model"].activation(x["model"].weight)

    def slopes(x, y):
        return jnp.sum(x["s"] * y.weight + x["decay"] * jnp.exp(-y.weight))

    problem = Problem(
        lambda x, y, e: 0.5 * x["c"] * jnp.sum(gap(x, y) ** 2) + slopes(x, y) + jnp.zeros_like(e),
        lambda x, y, e: 0.5 * jnp.sum((y.activation(y.weight) - e) ** 2),
    )
    column = lambda value: np.full(2, value, np.float32)
    return problem, FederatedData.stack([column(0.0)] * 3, [column(value) for value in (1.0, 2.0, 6.0)])


def test_float32_modules_keep_their_dtype_and_what_is_not_trained(modules):
    y = reference.solution(*modules, upper(2.0, 1.0), model(0.0))
    assert y.activation is identity and y.calls == 5
    assert y.weight.dtype == jnp.float32 and np.allclose(y.weight, 1.0, rtol=1e-6)
    h = reference.hypergradient(*modules, upper(2.0, 1.0), model(0.0), method="neumann")  # d_y f = 1 - 3 in each place
    assert h["model"].activation is None and h["model"].calls is None
    assert h["model"].weight.dtype == jnp.float32 and np.allclose(h["model"].weight, -2.0, rtol=1e-6)
    assert np.allclose([h["c"], h["s"]], [3 * -2.0 * 1 / 4, 3 * -2.0 * -1 / 2], rtol=1e-6)


@pytest.mark.parametrize(("curvature", "slope", "decay"), [(0.0, 1.0, 0.0), (-1.0, 0.0, 0.0), (0.0, 0.0, 1.0)])
def test_a_lower_level_without_a_minimiser_is_refused_in_a_sentence(modules, curvature, slope, decay):
    """A slope, a maximum (the start has no gradient), an infimum that is not attained; the program is the one above."""
    with pytest.raises(RunError, match=r"\|d_y g\| = .* must be bounded below and strongly convex"):
        reference.solution(*modules, upper(curvature, slope, decay), model(1.5))
