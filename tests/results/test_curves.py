"""When one run's values of a metric count as being at a level."""

import numpy as np
import pytest

from fedbilevel.results import curves


@pytest.mark.parametrize(
    ("values", "index"),
    [
        ([0, 1, 1, 1, 0], 4),
        ([0, 1, 0, 1, 0, 0, 1, 0], None),
        ([0, 1, 0, 1, 0, 1, 1], 5),
        ([1, 1, 1], 2),
        ([0, 0, 1], None),
        ([0, np.nan, 1, 1, 1, 1, 1], 6),
    ],
)
def test_a_level_counts_when_the_median_of_five_evaluations_is_there(values, index):
    assert curves.first_reached(values, 1) == index


def test_which_way_is_up():
    assert [curves.direction(name) for name in ("test_accuracy", "balanced_accuracy", "test_loss")] == [1, 1, -1]


def test_medians_of_five():
    assert curves.running_median([5, 1, 4, 2, 3, 9]).tolist() == [3, 3]
    assert curves.running_median([5, 1, 9]).tolist() == [5]
