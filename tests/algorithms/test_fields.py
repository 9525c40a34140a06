"""Settings keep their names, their order and their defaults: `dataclasses.fields`, `repr` and `--set` show the same."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from fedbilevel.algorithms import ALGORITHMS
from fedbilevel.pace.automatic import Auto, ready
from fedbilevel.settings import STEPS
from helpers.plain import RATES as NUMBERS

SETTINGS = json.loads(Path(__file__).with_name("settings.json").read_text())


def test_every_algorithm_is_there():
    assert set(ALGORITHMS) == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_fields_and_defaults_are_what_they_were(name):
    kind, known = ALGORITHMS[name], SETTINGS[name]
    fields = dataclasses.fields(kind)
    assert [field.name for field in fields] == known["fields"]
    assert [field.name for field in fields if field.metadata.get("static")] == known["static"]
    assert repr(kind()) == known["repr"]


@pytest.mark.parametrize("kind", ALGORITHMS.values(), ids=lambda kind: kind.__name__)
def test_steps_that_can_be_found_are_found_where_they_are_not_given(kind):
    steps = [field for field in dataclasses.fields(kind) if field.name in STEPS]
    for field in steps:
        can = "auto" in field.metadata["words"] and kind.paced  # else it would take rounds of its own
        assert field.default == ("auto" if can else NUMBERS[field.name])
    numbers = kind(**{field.name: NUMBERS[field.name] for field in steps})
    assert not isinstance(ready(numbers, jnp.zeros(2)), Auto)  # nothing is found beside it
