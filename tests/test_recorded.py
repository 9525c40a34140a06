"""Every algorithm gives the numbers that were recorded, to 1e-12: simulated, and, with every option, by Loopback."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import fedbilevel as fb
from helpers.recorded import SETTINGS, STEPS, VARIANTS, cases, recorded, run

FAST = {"lockstep", "aggitd", "fedbioacc-local"}
CASES = list(cases())
RECORDED = recorded()


def engines(case):
    """Loopback runs every option once, with weights; that it is the simulation elsewhere too is shown by test_engines.

    And with "auto" by pace/test_automatic.py.
    """
    both = case.setting.startswith("weights") and case.variant != "auto"
    return (fb.Simulation, fb.Loopback) if both else (fb.Simulation,)


def speed(case, engine):
    fast = case.algorithm in FAST and engine is fb.Simulation
    fast = fast and (case.problem, case.variant, case.setting) == ("quadratic", "plain", "weights, dropout")
    return () if fast else pytest.mark.slow


@pytest.mark.parametrize(
    ("case", "engine"),
    [
        pytest.param(case, engine, marks=speed(case, engine), id=f"{engine.__name__}: {case}")
        for case in CASES
        for engine in engines(case)
    ],
)
def test_the_numbers_are_those_that_were_recorded(case, engine):
    said, now = RECORDED[str(case)], run(case, engine)
    before, after = said["state"] | {"x.": said["x"], "y.": said["y"]}, now["state"] | {"x.": now["x"], "y.": now["y"]}
    assert set(before) == set(after)
    for part, expected in before.items():
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(after[part], expected, rtol=0, atol=1e-12 * max(1.0, np.abs(expected).max()))
    assert now["books"] == said["books"]


def test_every_algorithm_and_every_option_is_there():
    assert set(RECORDED) == {str(case) for case in CASES}
    assert {case.algorithm for case in CASES} == set(fb.algorithms.ALGORITHMS)
    used = {field for case in CASES for field in fields_at_work(case)}
    every = {field.name for kind in fb.algorithms.ALGORITHMS.values() for field in dataclasses.fields(kind)}
    assert every - used == set()


def fields_at_work(case):
    """The settings that a case gives a value of its own."""
    given = {
        *STEPS,
        *VARIANTS.get(case.variant, {}),
        *(["batch_size"] if "batch_size" in SETTINGS[case.setting] else []),
    }
    return given & {field.name for field in dataclasses.fields(fb.algorithms.ALGORITHMS[case.algorithm])}
