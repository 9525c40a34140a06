"""Scales: where values lie, and at which round ones ticks stand."""

import numpy as np
import pytest

from fedbilevel.page.axes import Axis, vertical


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [
        ([1.0, 101.0], True), ([1.0, 99.0], False), ([0.0, 1e9], False), ([-1.0, 1e9], False), ([1e-300, 1e300], True),
        ([], False), ([np.nan], False), ([5.0], False), ([0.0, 0.0], False),
    ],
)  # fmt: skip
def test_an_axis_is_logarithmic_above_two_decades_of_positive_values(values, logarithmic):
    axis = vertical(np.array(values), 100, 0)
    assert axis.logarithmic == logarithmic
    there = [value for value in values if np.isfinite(value)]
    assert all(0 <= axis.spot(value) <= 100 for value in there)
    ticks = axis.ticks()
    assert len(ticks) <= 8 and all(axis.low <= value <= axis.high for value, _ in ticks)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 60, ["0", "20", "40", "60"]),
        (-1, 1, ["-1", "-0.5", "0", "0.5", "1"]),
        (2, 2, ["2"]),
        (0, 1e-7, ["0", "2.5e-08", "5e-08", "7.5e-08", "1e-07"]),
    ],
)
def test_ticks_are_round(low, high, labels):
    assert [label for _, label in Axis(low, high, 0, 1).ticks()] == labels


def test_decades():
    axis = Axis(1e-3, 1e2, 100, 0, True)
    assert [label for _, label in axis.ticks()] == ["1e-3", "1e-1", "1e1"]
    np.testing.assert_allclose(axis.at(np.array([1e-3, 1e2])), [100, 0], atol=1e-9)
