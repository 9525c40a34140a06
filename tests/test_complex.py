"""Complex x and y are refused by name; complex rows with real losses are right."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fedbilevel as fb
from fedbilevel import reference
from fedbilevel.app import load_app, placeholder, schema
from fedbilevel.engines.nvflare.agreement import begin, derive, placeholder_data
from helpers import apps

KEY = jax.random.key(0)
STEPS = {"inner_lr": 0.1, "hessian_lr": 0.1, "outer_lr": 0.1}
X, Y = {"pull": jnp.asarray([0.2, -0.3]), "k": jnp.asarray(0.5)}, {"re": jnp.ones(2), "im": jnp.zeros(2)}


@pytest.fixture(autouse=True)
def promotion():
    """Real times complex is what such losses are written with."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# Every function that takes x and y ------------------------------------------------------------------------------------

TAKERS = {
    "solve": lambda p, d, x, y: fb.solve(p, d, fb.Lockstep(**STEPS), x, y, 2, key=KEY),
    "loopback": lambda p, d, x, y: fb.solve(p, d, fb.Lockstep(**STEPS), x, y, 2, key=KEY, engine=fb.Loopback()),
    "estimate": lambda p, d, x, y: fb.estimate_hypergradient(p, d, fb.AggITD(), x, y, key=KEY),
    "protocol": lambda p, d, x, y: fb.protocol(fb.AggITD(), p, d, x, y),
    "check_problem": fb.testing.check_problem,
    "outer_value": reference.outer_value,
    "inner_value": reference.inner_value,
    "value": reference.value,
    "hessian": reference.hessian,
    "solution": reference.solution,
    "stationarity": reference.stationarity,
    "exact": reference.hypergradient,
    "unrolled": lambda *given: reference.hypergradient(*given, method="unrolled"),
    "app": lambda p, d, x, y: begin(fb.App(p, fb.Lockstep(**STEPS), lambda: (x, y), lambda s: d, 1)),
    "App.begin": lambda p, d, x, y: fb.App(p, fb.Lockstep(**STEPS), lambda: (x, y), lambda s: d, 1).begin(),
}
PLAIN = fb.FederatedData.stack([np.ones(2), np.zeros(3)], [np.ones(2), np.zeros(1)])


def modulus(x, y, e):
    """Real for complex y too, so that nothing but the leaf tells."""
    total = sum(jnp.sum(jnp.abs(leaf - e) ** 2) for leaf in jax.tree.leaves(y))
    return total + sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(x))


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize(
    ("x", "y", "leaf"),
    [
        (jnp.zeros(2), {"w": jnp.zeros(3, jnp.complex64), "b": jnp.zeros(())}, r"y\['w'\] is .*complex64\[3\]"),
        ({"a": jnp.zeros(2), "z": np.complex128(1j)}, jnp.zeros(3), r"x\['z'\] is complex"),
        ((jnp.zeros(2), 1j), jnp.zeros(3), r"x\[1\] is complex"),
    ],
)
def test_complex_leaves_are_refused_by_name(taker, x, y, leaf):
    with pytest.raises(fb.InputError, match=leaf):
        TAKERS[taker](fb.Problem(modulus, modulus), PLAIN, x, y)


def turned(x, y, e):
    return jnp.sum(y**2) * jax.lax.complex(1.0, 0.0) + jnp.sum(x) * 0 * jnp.abs(e)


def real(x, y, e):
    return jnp.sum((y - e) ** 2) + jnp.sum(x**2)


class Turned(fb.Problem):
    """Oracles of its own."""

    def outer_value(self, x, y, rows):
        return jnp.sum(rows.weights) * jax.lax.complex(1.0, 1.0)


@pytest.mark.parametrize("taker", [taker for taker in TAKERS if "pp" not in taker])
@pytest.mark.parametrize(
    ("level", "problem"),
    [
        ("inner", fb.Problem(turned, real)),
        ("outer", fb.Problem(real, turned)),
        ("outer", Turned(real, real)),
    ],
)
def test_complex_losses_are_refused(taker, level, problem):
    with pytest.raises(fb.InputError, match=f"the {level} loss must be real.*complex128"):
        TAKERS[taker](problem, PLAIN, jnp.zeros(2), jnp.zeros(3))


def test_an_app_over_the_network_derives_nothing_from_a_complex_start(tmp_path):
    text = apps.CLOSED_FORM.replace("jnp.zeros(4), jnp.zeros(4)", "jnp.zeros(4), 1j * jnp.zeros(4)")
    app = load_app(apps.write(tmp_path, text, f"iterations=6, {apps.LOCKSTEP}"))
    rows = [schema(level) for level in app.rows("site-1")]
    with pytest.raises(fb.InputError, match="y is complex"):
        derive(app, placeholder_data(rows, 3, None), 3)


# Complex rows ---------------------------------------------------------------------------------------------------------
# g = |s (re + i im) - t (1 + k^2)|^2 / 2 + exp(pull) . (re^2 + im^2) / 2,  f = |s (re + i im) - t|^2 / 2 + |x|^2 / 20


def signal(y, e):
    return e["s"] @ jax.lax.complex(y["re"], y["im"])


def inner(x, y, e):
    gap = signal(y, e) - e["t"] * (1 + x["k"] ** 2)
    penalty = jnp.sum(jnp.exp(x["pull"]) * (y["re"] ** 2 + y["im"] ** 2))
    return 0.5 * jnp.abs(gap) ** 2 + 0.5 * penalty


def outer(x, y, e):
    gap = signal(y, e) - e["t"]
    size = jnp.sum(x["pull"] ** 2) + x["k"] ** 2
    return 0.5 * jnp.real(gap * jnp.conj(gap)) + 0.05 * size


def spectra(dtype=np.complex128):
    draw = np.random.default_rng(3)
    normal = lambda *shape: (draw.normal(size=shape) + 1j * draw.normal(size=shape)).astype(dtype)
    client = lambda i, n: {"s": (1 + 0.4 * i) * normal(n, 2), "t": normal(n) + i}
    one, other = ([client(i, n) for i, n in enumerate(sizes)] for sizes in ((3, 5, 2), (2, 1, 4)))
    return one, other


def pooled(clients, weights, scale):
    """The real least-squares problem that complex rows are: (A, b, a weight for each row)."""
    wide = [np.block([[c["s"].real, -c["s"].imag], [c["s"].imag, c["s"].real]]) for c in clients]
    b = [np.concatenate([c["t"].real, c["t"].imag]) for c in clients]
    share = [np.full(len(rows), scale * p * 2 / len(rows)) for rows, p in zip(wide, weights, strict=True)]
    return np.concatenate(wide), np.concatenate(b), np.concatenate(share)


WEIGHTS = np.array([1.0, 4.0, 2.0]) / 7


def closed_form(x):
    """(Phi, grad Phi by finite differences of it), both in numpy; x = (k, pull)."""
    one, other = spectra()
    (A, b, w), (C, c, v) = (pooled(rows, WEIGHTS, 1.0) for rows in (one, other))

    def phi(x):
        pull = np.diag(np.exp(np.concatenate([x[1:], x[1:]])))
        y = np.linalg.solve((A.T * w) @ A + pull, A.T @ (w * b * (1 + x[0] ** 2)))
        return 0.5 * v @ (C @ y - c) ** 2 + 0.05 * x @ x

    width = 1e-5
    return np.array([(phi(x + width * e) - phi(x - width * e)) / (2 * width) for e in np.eye(3)])


@pytest.mark.slow
def test_complex_rows_have_the_hypergradient_of_finite_differences():
    data = fb.FederatedData.stack(*spectra(), weights=WEIGHTS)
    problem = fb.Problem(inner, outer)
    expected = closed_form(np.asarray(ravel_pytree(X)[0]))
    for method in ("exact", "cg"):
        h = ravel_pytree(reference.hypergradient(problem, data, X, Y, method=method))[0]
        np.testing.assert_allclose(h, expected, rtol=1e-8)
    assert fb.testing.check_problem(problem, data, X, Y).passed


def batched(loss):
    def mean(x, y, examples, weights):
        return jnp.sum(weights * jax.vmap(lambda e: loss(x, y, e))(examples))

    return mean


@pytest.mark.slow
def test_complex_rows_are_solved_alike_by_both_engines():
    data = fb.FederatedData.stack(*spectra(), weights=WEIGHTS)
    algorithm = fb.Lockstep(inner_lr=0.05, hessian_lr=0.05, outer_lr=0.05, local_steps=2)
    problem = fb.Problem(batched(inner), batched(outer), batched=True)
    run = lambda engine, n: fb.solve(problem, data, algorithm, X, Y, n, key=KEY, engine=engine)
    one, other = run(fb.Simulation(), 20), run(fb.Loopback(), 20)
    np.testing.assert_allclose(ravel_pytree(one.x)[0], ravel_pytree(other.x)[0], rtol=1e-12)
    end = run(fb.Simulation(), 3000)
    assert np.linalg.norm(closed_form(np.asarray(ravel_pytree(end.x)[0]))) < 1e-6


@pytest.mark.slow
def test_complex_rows_as_users_have_them():
    """complex64 rows with float32 variables under standard promotion, features that are complex."""
    lift = lambda x, e: e["s"] * jnp.exp(x["k"])
    head = lambda x, y, e, phi: (
        0.5 * jnp.abs(phi @ jax.lax.complex(y["re"], y["im"]) - e["t"]) ** 2
        + 0.5 * jnp.sum(y["re"] ** 2 + y["im"] ** 2)
    )
    whole = lambda x, y, e: head(x, y, e, lift(x, e))
    with jax.enable_x64(False):
        data = fb.FederatedData.stack(*spectra(np.complex64))
        narrow = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)
        given = data, fb.AggITD(inner_lr=0.01, hessian_lr=0.01, outer_lr=0.1), narrow(X), narrow(Y), 5
        ends = [
            fb.solve(fb.Problem(loss, outer, features=phi), *given, key=KEY, engine=engine).x
            for loss, phi, engine in (
                (head, lift, fb.Simulation()),
                (whole, None, fb.Loopback()),
            )
        ]
    np.testing.assert_allclose(ravel_pytree(ends[0])[0], ravel_pytree(ends[1])[0], rtol=1e-5)
    assert ends[0]["k"].dtype == jnp.float32


def test_an_app_describes_complex_rows():
    rows = {"s": np.zeros((4, 2), np.complex64)}
    again = placeholder(schema(rows))
    assert again["s"].dtype == np.complex64 and again["s"].shape == (1, 2)
    assert json.loads(schema(rows))["dict"]["s"]["dtype"] == "complex64"
