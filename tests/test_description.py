"""A run described once: it is what `solve` does, wherever its parts come from."""

import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel.callbacks import Callback
from fedbilevel.settings import best
from helpers.plain import plain

TASK = fb.tasks.quadratic(clients=3)
LOCKSTEP = fb.Lockstep(inner_lr=0.1, hessian_lr=0.1, outer_lr=0.1)


class Heard(Callback):
    """Notes that it was started."""

    def __init__(self):
        self.times = 0

    def start(self, run):
        self.times += 1


@pytest.mark.parametrize("lazy", [False, True])
def test_it_is_what_solve_does(lazy):
    heard, engine = Heard(), fb.Simulation(cohort=2)
    run = fb.Description(
        problem=TASK.problem, algorithm=LOCKSTEP, data=(lambda: TASK.data) if lazy else TASK.data, rounds=4,
        start=(lambda: (TASK.x, TASK.y)) if lazy else (TASK.x, TASK.y), key=TASK.key, engine=engine,
        callbacks=(lambda: [heard]) if lazy else [heard], metrics=TASK.metrics, evaluate_every=2,
    )  # fmt: skip
    expected = fb.solve(TASK.problem, TASK.data, LOCKSTEP, TASK.x, TASK.y, rounds=4, key=TASK.key, engine=engine,
                        metrics=TASK.metrics, evaluate_every=2)  # fmt: skip
    got = run.run()
    np.testing.assert_array_equal(got.x, expected.x)
    assert [row["value"] for row in got.history] == [row["value"] for row in expected.history]
    assert heard.times == 1
    assert run.protocol().rounds == 1 and run.protocol().cohort == 2


@pytest.mark.slow
def test_its_precision_is_its_own():
    def start():
        task = fb.tasks.quadratic(clients=3)
        return task.x, task.y

    data = lambda: fb.tasks.quadratic(clients=3).data
    for bits in (32, 64):
        run = fb.Description(problem=TASK.problem, algorithm=LOCKSTEP, data=data, start=start, key=TASK.key,
                             iterations=1, precision=bits)  # fmt: skip
        assert run.run().x.dtype == f"float{bits}"


@pytest.mark.parametrize("engine", [fb.Simulation(), fb.Loopback()])
def test_kept_it_leaves_what_a_failure_left(tmp_path, engine):
    run = TASK.describe(plain(fb.Lockstep, inner_lr=90.0), iterations=80, engine=engine)
    with pytest.raises(fb.Diverged) as failure:
        fb.results.keep(run, tmp_path, quiet=True)
    with np.load(tmp_path / "variables.npz") as saved:
        np.testing.assert_array_equal(saved["x"], failure.value.result.x)
    assert '"failed"' in (tmp_path / "outcome.json").read_text()


def test_fashion_mnist_has_best_known_steps():
    """They were class defaults beside tuned ones once, and nobody said so."""
    for task in ("hyper-representation", "loss-tuning"):
        for name in ("aggitd", "lockstep", "fednest"):
            dataset = "mnist" if task == "loss-tuning" else "fashion-mnist"
            assert {"inner_lr", "outer_lr", "local_steps"} <= set(best(task, dataset, name))
    assert best("quadratic", "synthetic", "aggitd") == {}
