"""A list of callbacks, or a function that makes one."""

from __future__ import annotations

import pytest

import fedbilevel as fb
from fedbilevel.callbacks import Callback
from fedbilevel.callbacks.listeners import Listeners, listed


def fails():
    raise KeyError("no place")


def test_a_function_makes_new_ones_each_time():
    one, other = (listed(lambda: [Callback()], "callbacks=") for _ in range(2))
    assert len(one) == len(other) == 1 and one[0] is not other[0]
    same = [Callback()]
    assert listed(same, "callbacks=") == same


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (3, "callbacks= is a list of callbacks, or a function"),
        ([3], "callbacks= is a list of callbacks, or a function"),
        (lambda: 3, "the function in callbacks= returns a list of callbacks"),
        (Callback, "the function in callbacks= returns a list of callbacks"),
        (fails, "the function in callbacks= failed: KeyError: 'no place'"),
    ],
)
def test_others_are_refused(given, sentence):
    with pytest.raises(fb.InputError, match=sentence):
        listed(given, "callbacks=")


class Reads(Callback):
    def record(self, run, rows):
        pass


class Writes(Reads):
    in_bulk = True


@pytest.mark.parametrize(("kind", "waits"), [(Callback, False), (Reads, True), (Writes, False)])
def test_who_waits_for_rows(kind, waits):
    assert Listeners([Callback(), kind()]).row_by_row is waits
    late = Callback()
    late.record = lambda run, rows: None
    assert Listeners([late]).row_by_row
