"""What is tuned: ranges fit x, and values by hand lie in them."""

import jax
import numpy as np
import pytest

from fedbilevel_studies.tuning.grounds import GROUNDS
from helpers.places import DATA

HEARTS = DATA / "heart-disease"


@pytest.mark.parametrize("name", sorted(set(GROUNDS) - {"hearts"}))
def test_ranges_fit_x_and_by_hand_lies_in_them(name):
    fits(GROUNDS[name], None)


@pytest.mark.skipif(not HEARTS.is_dir(), reason="the hospitals' files are not here")
def test_ranges_fit_the_hospitals():
    fits(GROUNDS["hearts"], HEARTS)


def fits(ground, folder):
    task = ground.build(0, folder)
    assert ground.test in task.metrics
    low, high = ground.box(task.x)
    xs = [task.x] if ground.by_hand is None else [task.x, ground.by_hand(task)]
    for x in xs:
        inside = lambda a, b, c: a.shape == b.shape and a.dtype == b.dtype and np.all((a <= b) & (b <= c))
        assert jax.tree.all(jax.tree.map(inside, low, x, high))
    assert (ground.by_hand is None) == (ground.name == "hyper-representation")


def test_by_hand_is_one_over_the_frequency():
    task = GROUNDS["bank"].build(0, None)
    share = jax.nn.sigmoid(GROUNDS["bank"].by_hand(task)["class_weight"])
    assert float(share) == 0.5  # half of the loss for the few positives
    assert float(jax.nn.sigmoid(task.x["class_weight"])) < 0.1
