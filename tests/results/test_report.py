"""Figures: what stands at their axes and in their legends; tables: whose step sizes are whose."""

import pandas
import pytest

import fedbilevel as fb
from fedbilevel.results import report
from fedbilevel.settings import STEPS, chosen, told_apart, whence

MIXED = {"aggitd": "stored, outer_lr given", "fedmsa": "auto, inner_lr given"}
ALIKE = [
    {"aggitd": "stored", "fedmsa": "given"},
    {"aggitd": "auto", "fedmsa": "auto, inner_lr given"},
    {"fedmsa": "auto"},
]


@pytest.fixture(scope="module")
def frame():
    line = {"iteration": [0, 1], "rounds": [0, 3], "bytes_down": [0, 10], "bytes_up": [0, 10], "seconds": [0.0, 0.1]}
    one = lambda name, seed: pandas.DataFrame({"algorithm": name, "seed": seed, **line, "test_error": [1.0, 0.5]})
    return pandas.concat([one(name, seed) for name in MIXED for seed in (0, 1)], ignore_index=True)


@pytest.mark.parametrize(("steps", "names"), [(MIXED, ["aggitd", "fedmsa (auto)"]), (ALIKE[0], [*MIXED])])
def test_axes_are_named_and_untuned_algorithms_marked(frame, steps, names):
    figure = report.figure_of(frame.assign(megabytes=0.0), "test_error", told_apart(steps))
    assert [panel.get_xlabel() for panel in figure.axes] == list(report.AXES.values())
    assert figure.axes[0].get_ylabel() == "test error"
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == names


def test_where_steps_come_from_is_said_in_words():
    numbers, auto = {"inner_lr": 0.1, "hessian_lr": 0.1, "outer_lr": 0.1}, dict.fromkeys(STEPS, "auto")
    said = lambda source, given: whence(fb.AggITD, source, given)
    assert [said("stored", numbers), said("stored", auto), said("stored", {})] == ["given", "auto", "stored"]
    assert said("stored", {"outer_lr": "auto"}) == "stored, outer_lr auto"
    assert said("auto", {"inner_lr": 0.1, "outer_lr": "auto"}) == "auto, inner_lr given"
    assert said("stored", {"inner_lr": 0.1, "outer_lr": "auto"}) == "stored, inner_lr given, outer_lr auto"
    none = chosen("fedbioacc-local", ("quadratic", "none"), {})  # it would measure in rounds of its own
    assert none.steps == "class defaults" and none.algorithm.hessian_lr == 0.01
    assert chosen("aggitd", ("quadratic", "none"), {"inner_lr": 0.1}).steps == "auto, inner_lr given"


def test_class_defaults_are_marked_beside_others():
    steps = {"aggitd": "auto", "fednest": "stored", "fedbioacc-local": "class defaults, inner_lr given"}
    assert [*told_apart(steps).values()] == ["aggitd (auto)", "fednest", "fedbioacc-local (class defaults)"]


@pytest.mark.parametrize("steps", ALIKE)
def test_nobody_is_marked_where_all_are_alike(steps):
    assert told_apart(steps) == {name: name for name in steps}


def test_a_table_says_whose_steps_they_are(frame):
    summary = report.summarise(frame, MIXED)
    assert summary["step_sizes"].tolist() == list(MIXED.values())
    assert "step_sizes" not in report.summarise(frame)
