"""FedEx against its box in numpy: the distribution moves as it says, the likeliest x is returned, every byte is paid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedbilevel as fb
from fedbilevel_studies.tuning.fedex import VALUES, FedEx, State, fedex
from fedbilevel_studies.tuning.grounds import GROUNDS
from fedbilevel_studies.tuning.purse import Purse


class Scripted(fb.Federation):
    """Answers what clients would have, from a list."""

    def __init__(self, replies):
        self.replies = list(replies)

    def ask(self, method, message, combine, replies, cohort, beside):
        return self.replies.pop(0)

    repeat = until = randint = draw_cohort = None


def test_the_distribution_moves_as_the_box_says():
    values, y = jnp.arange(3.0), jnp.zeros(2)
    algorithm = FedEx(values=values, discount=0.5)
    hot = np.eye(3)
    rounds = [([0, 1], [3.0, 1.0]), ([1, 1], [1.0, 2.0]), ([2, 1], [5.0, 0.5])]  # who drew what, and what came of it
    replies, theta, baseline, past = [], np.full(3, 1 / 3), 0.0, []
    for drawn, losses in rounds:
        replies.append((jnp.ones(2), jnp.asarray(losses) @ hot[drawn] / 2, jnp.asarray(hot[drawn].mean(0))))
        gradient = np.zeros(3)
        for j, loss in zip(drawn, losses, strict=True):
            gradient[j] += 0.5 * (loss - baseline) / theta[j]
        theta = theta * np.exp(-np.sqrt(2 * np.log(3)) / np.abs(gradient).max() * gradient)
        theta /= theta.sum()
        past.append(np.mean(losses))
        weights = 0.5 ** np.arange(len(past))[::-1]
        baseline = weights @ past / weights.sum()
    fed, state = Scripted(replies), algorithm.init(values[0], y)
    assert isinstance(state, State)
    for _ in rounds:
        state, told = algorithm.step(fed, state)
    np.testing.assert_allclose(np.exp(state.log_theta), theta, rtol=1e-6)
    assert float(state.x) == np.argmax(theta) == 1 and float(told["loss"]) == pytest.approx(2.75)
    assert state.y.tolist() == [3, 3]


def test_one_run_pays_for_its_rounds_and_for_the_values():
    ground = GROUNDS["bank"]
    with jax.enable_x64(False):
        own = Purse(ground, ground.build(0, None), 20, jax.random.key(2))
        fedex(own, 20, 0)
    assert own.rounds == 20
    banks, x, y = 5, 4, 16
    down, up = y + VALUES, y + 2 * VALUES
    assert own.bytes == 4 * banks * (20 * (down + up) + VALUES * x)
    assert [point.rounds for point in own.trail] == [0, 5, 10, 15, 20, 20] and np.isfinite(own.best)
    assert jax.tree.all(jax.tree.map(np.array_equal, own.trail[-1].x, own.trail[-2].x))
