"""Candidates in words: what is told at one place is made again at another."""

from __future__ import annotations

import optax
import pytest

import fedbilevel as fb
from fedbilevel.algorithms import ALGORITHMS
from fedbilevel.tune.entrants import in_words, of_words

OWN = fb.AggITD(truncation="full", outer_lr=0.3, outer_optimizer=optax.adam(0.1))


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_algorithm_comes_back_as_it_was(name):
    kind = ALGORITHMS[name]
    for given in ({}, {"inner_lr": 0.25}):
        algorithm = kind(**given)
        said = in_words(algorithm, fb.Lockstep() if kind is not fb.Lockstep else OWN)
        assert said == (name, given)
        assert of_words(*said, OWN) == algorithm


@pytest.mark.parametrize("truncation", ["uniform", 3])
def test_the_applications_own_keeps_what_words_cannot_say(truncation):
    one = fb.AggITD(truncation=truncation, inner_lr=0.2, outer_lr=0.3, outer_optimizer=OWN.outer_optimizer)
    said = in_words(one, OWN)
    assert said == ("", {"truncation": truncation, "inner_lr": 0.2})
    again = of_words(*said, OWN)
    assert repr(again) == repr(one) and again.outer_optimizer is OWN.outer_optimizer


def test_what_has_no_words_is_refused():
    with pytest.raises(fb.InputError, match="AggITD has outer_optimizer="):
        in_words(OWN, fb.Lockstep())
    with pytest.raises(fb.InputError, match=r"lockstep has no settings \['outer_rate'\]"):
        of_words("lockstep", {"outer_rate": 0.1}, OWN)
    with pytest.raises(fb.InputError, match="did you mean 'lockstep'"):
        of_words("lockstp", {}, OWN)
