"""Problems that cannot mean what they say are refused before they run; those that may not are warned of."""

from __future__ import annotations

import json
import runpy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel import sanity
from fedbilevel.app import load_app
from fedbilevel.errors import FedbilevelWarning
from fedbilevel.problem import bind
from fedbilevel.tasks import TASKS, Options
from fedbilevel.variables import trainable
from helpers import apps
from helpers.network import call
from helpers.places import EXAMPLES

X, Y = jnp.asarray([0.3, -0.2]), jnp.asarray([0.5, 0.1, -0.4])
ALGORITHM = fb.Lockstep(inner_lr=0.02, hessian_lr=0.02, outer_lr=0.01)
ENGINES = [fb.Simulation(), fb.Loopback()]


def rows(clients=3):
    draw = np.random.default_rng(0)
    sizes = [4 + i % 7 for i in range(clients)]
    return [{"a": draw.normal(size=(n, 3)), "b": i % 7 + draw.normal(size=n)} for i, n in enumerate(sizes)]


DATA = fb.FederatedData.stack(rows(), rows())


def good(x, y, e):
    return 0.5 * (e["a"] @ y - e["b"]) ** 2 + 0.5 * jnp.exp(x[0]) * (y @ y)


def outer(x, y, e):
    return 0.5 * (e["a"] @ y - e["b"]) ** 2


def solve(inner, outer=outer, x=X, y=Y, data=DATA, engine=None, **options):
    problem = inner if isinstance(inner, fb.Problem) else fb.Problem(inner, outer)
    return fb.solve(problem, data, ALGORITHM, x, y, 1, key=jax.random.key(0), engine=engine, **options)


# What a loss depends on -----------------------------------------------------------------------------------------------

stop = jax.lax.stop_gradient
NOTHING = {
    "inner without y": (lambda x, y, e: jnp.sum(x**2) * e["b"], outer, "inner loss does not depend on y"),
    "inner without x": (lambda x, y, e: good(jnp.zeros(2), y, e), outer, "inner loss does not depend on x"),
    "outer without y": (good, lambda x, y, e: x @ x + e["b"], "outer loss does not depend on y"),
    "all of y stopped": (lambda x, y, e: good(x, stop(y), e), outer, "inner loss does not depend on y"),
    "all of x stopped": (lambda x, y, e: good(stop(x), y, e), outer, "inner loss does not depend on x"),
    "outer's y stopped": (good, lambda x, y, e: outer(x, stop(y), e) + x @ x, "outer loss does not depend on y"),
    "swapped": (good, lambda y, x, e: jnp.sum(y**2), "outer loss does not depend on y"),
    "times zero by name": (lambda x, y, e: good(x, jnp.zeros_like(y), e), outer, "does not depend on y"),
}


@pytest.mark.parametrize("engine", ENGINES, ids=["simulation", "loopback"])
@pytest.mark.parametrize("case", NOTHING)
def test_a_loss_without_what_it_needs_is_refused(case, engine):
    inner, upper, words = NOTHING[case]
    with pytest.raises(fb.InputError, match=words):
        solve(inner, upper, engine=engine)
    if case == "outer without y" and isinstance(engine, fb.Simulation):
        assert solve(inner, upper, engine=engine, check=False).iteration == 1


THRESHOLDS = {
    "a comparison": lambda x, y, e: jnp.where(jnp.sum(x) > 1, 1000.0, 1.0) * outer(x, y, e),
    "a rounded number": lambda x, y, e: jnp.floor(x[0]) * outer(x, y, e) + y @ y,
    "a branch": lambda x, y, e: jax.lax.cond(x[0] > 0, lambda: outer(x, y, e), lambda: y @ y),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", THRESHOLDS)
def test_a_variable_that_is_only_compared_is_a_warning(case):
    with pytest.warns(FedbilevelWarning, match="the inner loss reads x in comparisons or as whole numbers alone"):
        solve(THRESHOLDS[case])


def test_an_outer_loss_without_x_is_fine_and_so_is_a_leaf_without_influence():
    some = lambda x, y, e: good(x["k"], y["w"], e)
    upper = lambda x, y, e: outer(0, y["w"], e)
    solve(some, upper, x={"k": X, "idle": X}, y={"w": Y, "idle": Y}, check=True)


def test_what_is_batched_and_what_goes_through_features():
    def batched(phi):
        return lambda x, y, e, w, f: w @ (0.5 * (f @ y - e["b"]) ** 2) + 0.5 * (y @ y)

    upper = lambda x, y, e, w: w @ (0.5 * (e["a"] @ y - e["b"]) ** 2)
    scaled = lambda x, e: e["a"] * jnp.exp(x[0])
    solve(fb.Problem(batched(scaled), upper, batched=True, features=scaled))
    with pytest.raises(fb.InputError, match="inner loss does not depend on x"):
        solve(fb.Problem(batched(scaled), upper, batched=True, features=lambda x, e: e["a"]))


class OwnGradient(fb.Problem):
    """Brings its own derivative in y."""

    def inner_gradient(self, x, y, rows):
        return jax.tree.map(lambda leaf: -leaf, super().inner_gradient(x, y, rows))


class OwnProduct(fb.Problem):
    """Brings its own product with the Hessian."""

    def hessian_vector(self, x, y, v, rows):
        return jax.tree.map(lambda leaf: -leaf, super().hessian_vector(x, y, v, rows))


@pytest.mark.parametrize("kind", [OwnGradient, OwnProduct])
def test_own_oracles_are_what_is_looked_at(kind):
    with pytest.raises(fb.InputError, match="curves downwards in y along every one of the 3"):
        solve(kind(good, outer))


# Curvature and gradients ----------------------------------------------------------------------------------------------


def curved(*h, at=None):
    """An inner loss whose Hessian in y has these eigenvalues; client i's, if they are rows."""

    def inner(x, y, e):
        own = jnp.asarray(h) if at is None else at(e)
        return 0.5 * (own @ (y - 1 - x[0]) ** 2)

    return inner


@pytest.mark.parametrize("engine", ENGINES, ids=["simulation", "loopback"])
@pytest.mark.parametrize("h", [(-1.0, -2.0, -3.0), (-1e-3, -1e-3, -5.0), (0.0, 0.0, -1.0), (0.0, -1.0, -2.0)])
def test_downwards_along_every_direction_is_refused(h, engine):
    with pytest.raises(fb.InputError, match="curves downwards"):
        solve(curved(*h), engine=engine)


@pytest.mark.parametrize("dim", [9, 40, 200])
def test_downwards_in_more_dimensions_than_directions(dim):
    inner = lambda x, y, e: -0.5 * (y @ y) + x[0] * y[0] * e["b"]
    with pytest.raises(fb.InputError, match="along every one of the 8"):
        solve(inner, lambda x, y, e: y @ y, y=jnp.ones(dim))


@pytest.mark.parametrize("h", [(1.0, 1.0, -0.1), (1.0, -1.0, 1.0), (-5.0, -5.0, 0.1)])
def test_mixed_signs_are_a_warning(h):
    with pytest.warns(FedbilevelWarning, match="downwards in y along some directions") as said:
        solve(curved(*h))
    assert len(said) == 1


@pytest.mark.parametrize("h", [(1.0, 1e-3, 5.0), (1.0, 0.0, 0.0)])
def test_upwards_or_flat_in_places_is_fine(h):
    solve(curved(*h))


def test_the_mean_over_clients_decides_with_their_weights():
    """Every other client is concave; together they are convex, or not, as the weights say."""
    made = [{"h": np.full((3 + i, 3), h)} for i, h in enumerate((1.0, -1.0))]
    upper = lambda x, y, e: y @ y
    fine = fb.FederatedData.stack(made, made, [3.0, 1.0])
    solve(curved(at=lambda e: e["h"]), upper, data=fine)
    with pytest.raises(fb.InputError, match=r"from -0\.5 to -0\.5"):
        solve(curved(at=lambda e: e["h"]), upper, data=fb.FederatedData.stack(made, made, [1.0, 3.0]))


def test_what_some_rows_say_is_asked_of_all():
    """The rows that are looked at first are concave, their mean over all is not."""
    n = 4 * sanity.ROWS
    h = np.where(np.arange(n) % 4 == 0, -1.0, 2.0)
    data = fb.FederatedData.stack([{"h": np.tile(h[:, None], 3)}], [{"h": np.ones((5, 3))}])
    few = sanity._selected(data, sanity.ROWS)[0]
    assert few.count.sum() == sanity.ROWS and (h[few.index.ravel()] == -1).all()
    solve(curved(at=lambda e: e["h"]), lambda x, y, e: y @ y, data=data)


@pytest.mark.parametrize("clients", [1, 3, 40, 700])
def test_blocks_give_the_mean_over_all_rows(clients):
    """On a quadratic loss the figures of all rows are V'HV and V'gradient, worked out in numpy."""
    made, weights = rows(clients), None if clients == 40 else [1.0 + i % 3 for i in range(clients)]
    data = fb.FederatedData.stack(made, made, weights)
    problem, v = fb.Problem(good, outer), sanity.directions(Y)
    figures = sanity.measure(problem, X, Y, v, data, sanity._selected(data, None))
    p = np.full(clients, 1 / clients) if data.weights is None else np.asarray(data.weights)
    H, g = np.exp(X[0]) * np.eye(3), np.exp(X[0]) * np.asarray(Y)
    slope = np.zeros(3)
    for i in range(clients):
        a, b = made[i]["a"], made[i]["b"]
        H = H + p[i] * a.T @ a / len(a)
        slope = slope + p[i] * a.T @ (a @ Y - b) / len(a)
    np.testing.assert_allclose(figures.curvature, v @ H @ v.T, rtol=1e-10)
    np.testing.assert_allclose(figures.inner, v @ (g + slope), rtol=1e-9)
    np.testing.assert_allclose(figures.outer, v @ slope, rtol=1e-9)


def test_a_gradient_of_exactly_zero_is_a_warning():
    product = lambda x, y, e: (9 * y[0] * y[1] - e["b"]) ** 2 + x[0] * (y @ y)
    for inner in (product, lambda x, y, e: x[0] * jnp.sum(y**4)):  # a saddle, and flat
        with pytest.warns(FedbilevelWarning, match="inner loss in y is exactly zero at the start"):
            solve(inner, lambda x, y, e: y @ y + y.sum(), y=jnp.zeros(2))
    bowl = lambda x, y, e: jnp.exp(x[0]) * (y @ y)
    solve(bowl, lambda x, y, e: y @ y + y.sum(), y=jnp.zeros(2))  # at its minimum already
    with pytest.warns(FedbilevelWarning, match="outer loss in y is exactly zero at the start"):
        solve(good, lambda x, y, e: y @ y, y=jnp.zeros(3))
    solve(good, y=jnp.zeros(3))


def test_an_inner_loss_that_is_linear_in_y_is_a_warning():
    with pytest.warns(FedbilevelWarning, match="no curvature in y"):
        solve(lambda x, y, e: x[0] * (e["a"] @ y), outer)


def test_it_counts_no_round_and_a_resumed_run_skips_it(tmp_path):
    save = [fb.callbacks.Checkpoint(tmp_path)]
    one, other = solve(good), solve(good, check=False, callbacks=save)
    drop = lambda run: [{k: v for k, v in row.items() if k != "seconds"} for row in run.history]
    np.testing.assert_equal(drop(one), drop(other))
    with pytest.warns(FedbilevelWarning, match="some directions"):
        solve(curved(1.0, 1.0, -0.1), callbacks=save)
    solve(curved(1.0, 1.0, -0.1), resume=tmp_path)


def test_half_precision_and_more_dtypes_in_one_y():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        half = jnp.bfloat16
        made = [{"a": np.ones((3, 2), np.float32), "b": np.ones(3, np.float32)}]
        data = fb.FederatedData.stack(made, made)
        inner = lambda x, y, e: (e["a"] @ y["w"].astype(jnp.float32) - y["s"]) ** 2 + x * (y["w"] @ y["w"])
        y = {"w": jnp.full(2, 0.3, half), "s": jnp.asarray(0.25, jnp.float32)}
        x = jnp.asarray(0.5)
        sanity.check_sane(fb.Problem(inner, inner), data, x, y)
        with pytest.raises(fb.InputError, match="downwards"):
            sanity.check_sane(fb.Problem(lambda *a: -inner(*a), inner), data, x, y)


# What is shipped ------------------------------------------------------------------------------------------------------


def look(problem, data, x, y):
    x, x_rest = trainable(x, "x")
    y, y_rest = trainable(y, "y")
    sanity.check_sane(bind(problem, x_rest, y_rest), data, x, y)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dataset"), [(k.name, d) for k in TASKS.values() for d in k.datasets])
def test_every_task_at_its_own_start_passes_without_a_warning(name, dataset):
    with jax.enable_x64(False):
        try:
            task = TASKS[name](Options(dataset=dataset))
        except fb.InputError as error:
            pytest.skip(f"not here: {error}")
        look(task.problem, task.data, task.x, task.y)


def test_the_example_app_passes_without_a_warning(tmp_path):
    place = shutil.copytree(EXAMPLES / "hospitals", tmp_path / "hospitals")
    runpy.run_path(str(place / "sample.py"), run_name="__main__")
    app = load_app(place / "app.py")
    with jax.enable_x64(app.precision == 64), jax.numpy_dtype_promotion("standard"):
        look(app.problem, app.data([f"site-{i + 1}" for i in range(3)]), *app.begin())


# Apps and the command line --------------------------------------------------------------------------------------------

CONCAVE = apps.CLOSED_FORM.replace("return 0.5 * (e", "return -0.5 * (e", 1).replace("+ 0.5", "- 0.5")
MIXED = apps.CLOSED_FORM.replace("jnp.exp(x) * y**2", "jnp.array([-9.0, 1, 1, 1]) * jnp.exp(x) * y**2")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["simulation", "loopback"])
def test_an_app_is_looked_at_unless_it_or_the_command_says_no(tmp_path, fedbilevel, engine):
    file = apps.write(tmp_path, CONCAVE, f"iterations=1, {apps.LOCKSTEP}")
    words = ("run", file, "--engine", engine, "--out", tmp_path / "out")
    code, _, said = fedbilevel(*words)
    assert code == 2 and said.startswith("fedbilevel: the inner loss curves downwards") and said.count("\n") == 1
    assert fedbilevel(*words, "--no-check", "--overwrite")[0] == 0
    apps.write(tmp_path, CONCAVE, f"iterations=1, check=False, {apps.LOCKSTEP}")
    assert fedbilevel(*words, "--overwrite")[0] == 0


def test_the_command_prints_a_warning_once(tmp_path, fedbilevel):
    file = apps.write(tmp_path, MIXED, f"iterations=1, {apps.LOCKSTEP}")
    code, _, said = fedbilevel("run", file, "--out", tmp_path / "out")
    warned = [line for line in said.splitlines() if line.startswith("fedbilevel: warning: ")]
    assert code == 0 and len(warned) == 1
    assert "curves downwards in y along some directions" in warned[0] and "sanity.py" not in said


@pytest.mark.slow
def test_a_task_runs_and_compares_with_and_without_it(fedbilevel):
    words = ("compare", "quadratic", "--iterations", 1, "--json", "--algorithms", "lockstep", "--seeds", 1)
    assert fedbilevel(*words)[1].split("seconds")[0] == fedbilevel(*words, "--no-check")[1].split("seconds")[0]


# Over the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [3.0, 1.0, 2.0]])
def test_the_mean_of_what_sites_tell_is_the_simulation_s(weights):
    made, v = rows(), sanity.directions(Y)
    data, problem = fb.FederatedData.stack(made, made, weights), fb.Problem(good, outer)
    said = [sanity.told(problem, fb.FederatedData.stack([own], [own]), X, Y) for own in made]
    whole = sanity.measure(problem, X, Y, v, data, sanity._selected(data, None))
    p = np.full(3, 1 / 3) if weights is None else np.asarray(weights) / sum(weights)
    np.testing.assert_allclose(p @ [site[0] for site in said], whole.curvature.ravel(), rtol=1e-12)
    sanity.judge_all(said, list(p), Y)
    with pytest.raises(fb.InputError, match="curves downwards"):
        sanity.judge_all([[[-a for a in part] for part in site] for site in said], list(p), Y)
    with pytest.raises(fb.InputError, match="cannot be read"):
        sanity.judge_all([*said[:2], None], list(p), Y)


@pytest.mark.network
def test_sites_look_before_the_run_begins(tmp_path):
    concave = apps.write(tmp_path, CONCAVE, f"iterations=2, {apps.LOCKSTEP}")
    words = ("run", concave, "--engine", "nvflare", "--clients", 2, "--out", tmp_path / "out")
    assert "fedbilevel: the inner loss curves downwards" in call(*words, code=2)
    assert not (tmp_path / "out" / "history.csv").exists()
    call(*words, "--no-check", "--overwrite")
    apps.write(tmp_path, MIXED, f"iterations=2, {apps.LOCKSTEP}")
    said = call(*words, "--overwrite")
    assert said.count("fedbilevel: warning: the inner loss curves downwards in y along some directions") == 1
    told = json.loads((tmp_path / "out" / "outcome.json").read_text())["warnings"]
    assert len(told) == 1 and told[0] in said


# Padding of batches -----------------------------------------------------------------------------------------------------


def normalised(a):
    return (a - a.mean(0, keepdims=True)) / (a.std(0, keepdims=True) + 0.1)


def of_batch(prepare, level="inner"):
    one = lambda x, y, rows, w: w @ (rows["a"] @ y - rows["b"]) ** 2 + jnp.exp(x) * y @ y / 10
    other = lambda x, y, rows, w: one(x, y, {**rows, "a": prepare(rows["a"])}, w)
    return fb.Problem(*((other, one) if level == "inner" else (one, other)), batched=True)


def sites(*counts):
    draw = np.random.default_rng(0)
    return [{"a": draw.normal(size=(n, 3)), "b": draw.normal(size=n)} for n in counts]


@pytest.mark.parametrize("level", ["inner", "outer"])
def test_padding_that_counts_in_a_batched_loss_is_refused_where_there_is_padding(level):
    ragged, even = (fb.FederatedData.stack(*[sites(*counts)] * 2) for counts in ((5, 9, 2), (4, 4, 4)))
    given = fb.Lockstep(inner_lr=0.1, hessian_lr=0.1, outer_lr=0.1), jnp.array(0.0), jnp.ones(3), 2
    run = lambda problem, data, **more: fb.solve(problem, data, *given, key=jax.random.key(0), **more)
    with pytest.raises(fb.InputError, match=f"rows of weight zero count in the {level} loss of a batch: 4 rows give"):
        run(of_batch(normalised, level), ragged)
    run(of_batch(normalised, level), ragged, check=False)
    run(of_batch(normalised, level), even)
    run(of_batch(lambda a: a, level), ragged)
