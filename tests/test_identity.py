"""What makes a run itself: everything that changes numbers, in this process and in another, and nothing else."""

import dataclasses
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedbilevel as fb
from fedbilevel.callbacks import Checkpoint
from fedbilevel.callbacks.checkpoint import FILE
from helpers.places import TESTS
from helpers.resumed import NEST, ROWS, STEPS, X, Y, losses, solve, with_optimizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    solve(2, callbacks=[Checkpoint(folder)])
    return folder


def refused(saved, **changed) -> str:
    with pytest.raises(fb.InputError, match="of another run: ") as refusal:
        solve(resume=saved, **changed)
    return str(refusal.value).split("of another run: ")[1]


def test_new_functions_that_compute_the_same_resume(saved):
    np.testing.assert_array_equal(solve(resume=saved).x["a"], solve().x["a"])


OTHERS = {
    "a captured array": ("losses", {"problem": losses(pull=1.1)}),
    "a captured number": ("losses", {"problem": losses(slope=0.2 + 1e-15)}),
    "dropout": ("dropout", {"engine": fb.Simulation(dropout=0.2)}),
    "whole numbers in x": ("other leaves", {"x": {"a": X["a"], "n": jnp.arange(2)}}),
    "a word in y": ("other leaves", {"y": {"b": Y["b"], "kind": "wide"}}),
    "weights": ("data", {"data": fb.FederatedData.stack(ROWS, ROWS, weights=[1, 2, 3])}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_run_is_refused(saved, what):
    named, changed = OTHERS[what]
    assert f"{named} was " in refused(saved, **changed)


def test_a_leaf_that_is_no_float_counts_by_its_value(tmp_path):
    start = lambda n, kind: {"x": {"a": X["a"], "n": jnp.asarray(n)}, "y": {"b": Y["b"], "kind": kind}}
    solve(2, **start(1, "wide"), callbacks=[Checkpoint(tmp_path)])
    assert solve(resume=tmp_path, **start(1, "wide")).iteration == 3
    for other in (start(2, "wide"), start(1, "deep")):
        assert refused(tmp_path, **other).count(" was ") == 1


@pytest.mark.slow
def test_how_it_is_computed_does_not_count(saved, tmp_path):
    engine = fb.Simulation(client_batch=2)
    np.testing.assert_allclose(solve(resume=saved, engine=engine).x["a"], solve().x["a"], rtol=1e-13)
    solve(2, engine=fb.Loopback(), callbacks=[Checkpoint(tmp_path)])
    patient = fb.Loopback(shuffle=5, faults=fb.Faults(minimum=1))
    np.testing.assert_allclose(solve(resume=tmp_path, engine=patient).x["a"], solve().x["a"], rtol=1e-13)
    assert "dropout was 0.0" in refused(tmp_path, engine=fb.Loopback(dropout=0.2))


def test_a_transformation_of_optax_is_known_by_what_it_does(tmp_path):
    schedule = lambda rate: optax.adam(optax.exponential_decay(rate, 10, 0.9))
    solve(2, **with_optimizer(schedule(0.1)), callbacks=[Checkpoint(tmp_path)])
    assert solve(resume=tmp_path, **with_optimizer(schedule(0.1))).iteration == 3
    assert "outer_optimizer was " in refused(tmp_path, **with_optimizer(schedule(0.2)))
    assert "outer_optimizer was " in refused(tmp_path, **with_optimizer(optax.adam(0.1)))


OTHER_PROCESS = """
import jax, sys
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
sys.path.insert(0, {tests!r})
import optax
from helpers.resumed import losses, solve, with_optimizer
fixed = solve(resume={folder!r}, problem=losses({pull}), **with_optimizer(optax.adam({rate})))
print(fixed.iteration)
"""


def elsewhere(folder, pull=1.0, rate=0.1):
    code = OTHER_PROCESS.format(tests=str(TESTS), folder=str(folder), pull=pull, rate=rate)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)


@pytest.mark.slow
def test_another_process_resumes_the_same_run_and_refuses_another(tmp_path):
    solve(2, **with_optimizer(optax.adam(0.1)), callbacks=[Checkpoint(tmp_path)])
    same = elsewhere(tmp_path)
    assert same.stdout.split() == ["3"], same.stderr
    assert "outer_optimizer was" in elsewhere(tmp_path, rate=0.2, pull=1.5).stderr


# Other versions --------------------------------------------------------------------------------------------------------


def rewritten(folder, change):
    head, arrays = (folder / FILE).read_bytes().split(b"\n", 1)
    head = json.loads(head)
    change(head["fingerprint"])
    (folder / FILE).write_bytes(json.dumps(head).encode() + b"\n" + arrays)


def test_of_another_version_of_jax_the_oracles_values_are_compared(tmp_path):
    solve(2, **with_optimizer(optax.adam(0.1)), callbacks=[Checkpoint(tmp_path)])
    rewritten(tmp_path, lambda run: run.update({"losses": "0", "structure": "0", "outer_optimizer": "optax 0"}))
    assert "losses was '0'" in refused(tmp_path, **with_optimizer(optax.adam(0.1)))
    rewritten(tmp_path, lambda run: run.update({"written by": "jax 0.99"}))
    assert solve(resume=tmp_path, **with_optimizer(optax.adam(0.1))).iteration == 3
    assert "values or derivatives" in refused(tmp_path, problem=losses(1.01), **with_optimizer(optax.adam(0.1)))
    assert "values or derivatives" in refused(tmp_path, **with_optimizer(optax.adam(0.2)))
    assert "inner_lr was" in refused(tmp_path, algorithm=dataclasses.replace(NEST, inner_lr=0.2))


def test_a_checkpoint_that_does_not_say_what_the_losses_compute_is_refused(tmp_path):
    solve(2, callbacks=[Checkpoint(tmp_path)])
    rewritten(tmp_path, lambda run: [run.pop(name) for name in ("losses", "written by", "oracles")])
    assert "an earlier version of fedbilevel wrote it" in refused(tmp_path)


class FirstOrder(fb.Problem):
    """A problem that has no second derivatives to give."""

    def hessian_vector(self, x, y, v, rows):
        raise RuntimeError("a second derivative was asked for")

    def cross_vector(self, x, y, v, rows):
        raise RuntimeError("a second derivative was asked for")


def test_a_problem_without_second_derivatives_is_kept_and_goes_on(tmp_path):
    given = {"algorithm": fb.MemFBO(**STEPS), "check": True}
    problem = lambda: FirstOrder(losses().inner, losses().outer)
    whole = solve(problem=problem(), **given)
    solve(2, problem=problem(), callbacks=[Checkpoint(tmp_path)], **given)
    np.testing.assert_array_equal(solve(problem=problem(), resume=tmp_path, **given).x["a"], whole.x["a"])
