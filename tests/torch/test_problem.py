"""Every algorithm on a problem in torch does what it does on the same problem in JAX: the same draws, the same numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jaxtyping
import numpy as np
import pytest
import torch

import fedbilevel as fb
import fedbilevel.torch as ft
from fedbilevel.algorithms import ALGORITHMS
from fedbilevel.engines.simulated import compiling
from fedbilevel.problem import ORACLES
from fedbilevel.torch.host import Asked
from helpers.twins import WEIGHTS, twins

STEPS = {"inner_lr": 0.1, "outer_lr": 0.05, "hessian_lr": 0.1, "inner_rounds": 2, "local_steps": 2, "neumann_terms": 2}
CLOSE = {64: 1e-10, 32: 1e-4}


def algorithm(name: str, batch: int | None) -> fb.Algorithm:
    kind = ALGORITHMS[name]
    fields = {field.name for field in dataclasses.fields(kind)}
    given = STEPS | {"batch_size": batch}
    return kind(**{setting: value for setting, value in given.items() if setting in fields})


def ran(twin, name: str, batch: int | None, engine: fb.engines.Engine) -> fb.Result:
    return fb.solve(
        twin.problem,
        twin.data,
        algorithm(name, batch),
        twin.x,
        twin.y,
        5,
        key=jax.random.key(3),
        engine=engine,
        check=False,
    )


def apart(ours: fb.Result, theirs: fb.Result) -> float:
    """The largest difference, of the largest number."""
    pairs = [(np.asarray(tree[name]), np.asarray(other[name])) for tree, other in
             ((ours.x, theirs.x), (ours.y, theirs.y)) for name in other]  # fmt: skip
    return max(np.abs(a - b).max() for a, b in pairs) / max(np.abs(b).max() for _, b in pairs)


@pytest.fixture
def unchecked():
    """Annotations are not checked, which would take half of the time: the same calls are made elsewhere."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_as_in_jax(name: str, model: str, bits: int):
    """The MLP with weights, everyone and all rows; the CNN with a cohort and minibatches; both with dropout of clients."""
    with jax.enable_x64(bits == 64), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        weights, cohort, batch = (WEIGHTS, None, None) if model == "mlp" else (None, 2, 3)
        ours, twin = twins(model, bits, weights)
        theirs = ran(twin, name, batch, fb.Simulation(cohort=cohort, dropout=0.2))
        for engine in (fb.Simulation(cohort=cohort, dropout=0.2), fb.Loopback(cohort=cohort, dropout=0.2)):
            found = ran(ours, name, batch, engine)
            assert all(isinstance(leaf, torch.Tensor) for leaf in (*found.x.values(), *found.y.values()))
            assert {leaf.dtype for leaf in found.x.values()} == {getattr(torch, f"float{bits}")}
            assert apart(found, theirs) < CLOSE[bits]
            books = lambda run: [(row["rounds"], row["bytes_down"], row["bytes_up"]) for row in run.history]
            assert books(found) == books(theirs)
        start = np.concatenate([leaf.numpy().ravel() for leaf in ours.x.values()])
        end = np.concatenate([leaf.numpy().ravel() for leaf in found.x.values()])
        assert np.abs(end - start).max() > 1e-6


def test_in_64_bits_too_it_is_compiled_quickly_until_that_pays_no_more(monkeypatch):
    """As if each iteration took four seconds: JAX's twin is compiled in full from the second on, or in 64 bits at once."""
    monkeypatch.setattr(fb.engines.simulation._Simulated, "_pace", lambda *_: 4.0)
    monkeypatch.setattr(compiling, "_PACES", compiling.Kept(4))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        ours, twin = twins("mlp", 64)
        steps = fb.SimFBO(inner_lr=0.01, hessian_lr=0.01, outer_lr=0.01)
        how = {"key": jax.random.key(0), "check": False}
        run = lambda given, n: fb.solve(given.problem, given.data, steps, given.x, given.y, n, **how)
        assert [run(ours, n).compiled for n in (1, 2, 3)] == ["quick", "quick", "full"]
        assert run(twin, 1).compiled == "full"


def test_a_run_is_gone_on_with(tmp_path):
    """With its best and its states; by the same losses alone: what they hold counts."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        ours, _ = twins("mlp", 64)
        how = {"key": jax.random.key(0), "keep": "validation_loss:min", "check": False}
        given = ours.data, fb.Lockstep(batch_size=3), ours.x, ours.y
        fb.solve(ours.problem, *given, 4, callbacks=[fb.callbacks.Checkpoint(tmp_path, every=2)], **how)
        whole, more = (fb.solve(ours.problem, *given, 7, resume=resume, **how) for resume in (None, tmp_path))
        for name, leaf in whole.x.items():
            torch.testing.assert_close(more.x[name], leaf, rtol=0, atol=1e-14)
        assert more.best().iteration == whole.best().iteration
        assert isinstance(more.best().y["0.weight"], torch.Tensor)

        inner, factor = ours.problem.inner, torch.tensor(1.5, dtype=torch.float64)
        other = ft.Problem(lambda *args: factor * inner(*args), ours.problem.outer)
        with pytest.raises(fb.InputError, match="loss"):
            fb.solve(other, *given, 7, resume=tmp_path, **how)


def asked(twin, name: str, vectors: int, v) -> Callable:
    """An oracle of a client, by its number."""
    level = getattr(twin.data, "outer" if name.startswith("outer") else "inner")
    x, y = ({key: np.asarray(leaf) for key, leaf in tree.items()} for tree in (twin.x, twin.y))
    return lambda i: getattr(twin.problem, name)(x, y, *[v] * vectors, level.client(i).all())


@pytest.mark.parametrize("name", ORACLES)
def test_oracles_by_themselves_and_within_transformations(name):
    """As those of the same losses in JAX: outside of programs, within jit and vmap, with padding."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        both = twins("mlp", 64)
        v = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.5, both[1].y)
        one, other = (asked(twin, name, ORACLES[name], v) for twin in both)
        every = np.arange(4)
        for found, exact in (
            (one(1), other(1)),
            (jax.jit(one)(1), other(1)),
            (jax.vmap(one)(every), jax.vmap(other)(every)),
        ):
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


def test_what_a_program_asks_compares_with_rows_and_with_their_numbers():
    leaf = jax.tree.structure(0)
    with_rows, with_numbers = (Asked("inner_value", "", leaf, leaf, rows) for rows in ((leaf,), ()))
    assert with_rows != with_numbers
    assert with_numbers != with_rows


def test_blocks_that_belong_to_clients_are_those_of_the_twin():
    """Each client's own loss weight and head, in torch and in JAX: the same run."""
    draw = np.random.default_rng(0)
    client = lambda i, n: {"a": draw.normal(size=(n, 3)), "b": draw.normal(size=n) + i}
    rows = [[client(i, 4 + 2 * i) for i in range(3)] for _ in range(2)]
    data = fb.FederatedData.stack(*rows)

    def loss(x, y, batch, weights, exp, along):
        error = batch["a"] @ (y["body"] + y["head"]) - batch["b"]
        return exp(x) * (weights * error**2).sum() + along(y["head"])

    def problem(of, exp):
        outer = lambda x, y, batch, weights: loss(0 * x, y, batch, weights, exp, lambda _: 0.0)
        return of(lambda x, y, batch, weights: loss(x, y, batch, weights, exp, lambda v: 0.1 * (v**2).sum()), outer)

    numbers = {"x": draw.normal(size=3), "body": draw.normal(size=3), "head": draw.normal(size=(3, 3))}

    def start(made):
        given = {name: made(value) for name, value in numbers.items()}
        return fb.per_client(given["x"]), {"body": given["body"], "head": fb.per_client(given["head"])}

    algorithm = fb.Lockstep(inner_lr=0.01, hessian_lr=0.01, outer_lr=0.01)
    results = []
    for made, one in (
        (torch.tensor, problem(ft.Problem, torch.exp)),
        (np.asarray, problem(lambda f, g: fb.Problem(f, g, batched=True), jax.numpy.exp)),
    ):
        engine = fb.Simulation(cohort=2)
        results.append(
            fb.solve(one, data, algorithm, *start(made), 4, key=jax.random.key(0), engine=engine, check=False)
        )
    mine, twin = ((result.x.value, result.y["head"].value, result.y["body"]) for result in results)
    for one, other in zip(mine, twin, strict=True):
        assert isinstance(one, torch.Tensor)
        np.testing.assert_allclose(one.numpy(), np.asarray(other), rtol=1e-10)
    assert results[0].history[-1]["bytes_up"] == results[1].history[-1]["bytes_up"]


SIZES = (4, 6, 9)


def low(x, y, batch, weights):
    return (weights * (batch[0] @ y["w"] < batch[1])).sum()


def rate(x, y, batch, weights):
    high = batch[1] > 0.5
    return (weights * ((batch[0] @ y["w"] < batch[1]) & high)).sum(), (weights * high).sum()


@pytest.fixture
def regression():
    draw = np.random.default_rng(0)
    rows = [(torch.tensor(draw.normal(size=(n, 3))), torch.tensor(draw.normal(size=n))) for n in SIZES]
    outer = lambda x, y, batch, w: (w * 0.5 * (batch[0] @ y["w"] - batch[1]) ** 2).sum()
    inner = lambda x, y, batch, w: outer(x, y, batch, w) + 0.5 * torch.exp(x["r"]) * (y["w"] ** 2).sum()
    start = {"r": torch.zeros((), dtype=torch.float64)}, {"w": torch.ones(3, dtype=torch.float64)}
    return ft.Problem(inner, outer), fb.FederatedData.stack(rows, rows, "rows"), start, rows


@pytest.mark.parametrize("engine", [fb.Simulation(), fb.Loopback()], ids=["sim", "loop"])
def test_how_each_client_fares_is_what_torch_says_of_its_rows(regression, engine):
    problem, data, (x, y), rows = regression
    metrics = {"low": low, "rate": rate, "loss": fb.validation_loss}
    how = {"key": jax.random.key(0), "engine": engine, "client_metrics": metrics}
    result = fb.solve(problem, data, fb.Lockstep(inner_lr=0.02, hessian_lr=0.02, outer_lr=0.02), x, y, 3, **how)
    hits = [a @ result.y["w"] < b for a, b in rows]
    lows = [hit.double().mean().item() for hit in hits]
    rates = [((hit & (b > 0.5)).sum() / (b > 0.5).sum()).item() for hit, (_, b) in zip(hits, rows, strict=True)]
    np.testing.assert_allclose(result.clients.columns["low"], lows, rtol=1e-12)
    np.testing.assert_allclose(result.clients.columns["rate"], rates, rtol=1e-6)
    np.testing.assert_allclose(result.clients.mean["low"], np.average(lows, weights=SIZES), rtol=1e-12)
    np.testing.assert_allclose(result.history[-1]["loss_worst"], result.clients.columns["loss"].max(), rtol=1e-15)
    assert str(result.evaluate(problem, data, metrics)) == str(result.clients)
    said = result.predict(lambda x, y, batch: batch[0] @ y["w"], rows[1])
    torch.testing.assert_close(said, rows[1][0] @ result.y["w"])


def test_client_metrics_that_cannot_be_meant_are_refused(regression):
    problem, data, (x, y), _ = regression
    bad = {
        r"is called as fn\(x, y, examples, weights\), and it takes other arguments": lambda x, y, row: 1.0,
        r"must return one real number for a batch, .* it returned tensors of shapes \(4, 3\)": lambda x, y, b, w: b[0],
        "failed: TypeError": lambda x, y, b, w: b["z"],
    }
    for sentence, metric in bad.items():
        with pytest.raises(fb.InputError, match="the client metric 'odd' " + sentence):
            fb.solve(problem, data, fb.Lockstep(), x, y, 1, key=jax.random.key(0), client_metrics={"odd": metric})
