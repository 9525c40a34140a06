"""Settings keep their names, their order and their defaults: `dataclasses.fields`, `repr` and `--set` show the same."""

import dataclasses
import json
from pathlib import Path

import pytest

from fedbilevel.algorithms import ALGORITHMS

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
