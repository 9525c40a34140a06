"""An algorithm is whole and final: one class in one file, whose fields, state and iteration stand there."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import fedbilevel as fb
from fedbilevel.algorithm import Checked, Component, component, modules_in
from fedbilevel.algorithms import ALGORITHMS

DEFAULTS = {"init", "client_init", "estimate", "spares_unasked"}  # of the contract: an algorithm may write its own
HERE = Path(fb.algorithms.__file__).parent
X, Y = jnp.zeros(2), {"w": jnp.zeros(3)}


class _Base(fb.Algorithm):
    """Wrong on purpose: a base that is no contract."""

    size: int = fb.count(1)

    def step(self, fed, state):
        return state, self.told(state)

    def told(self, state):
        return {}


class _Derived(_Base):
    def told(self, state):
        return {"size": 1.0}


def ancestors(kind):
    """The classes of this library, or of its tests, that a class derives from."""
    ours = ("fedbilevel.", __name__)
    return [each for each in kind.__mro__[1:] if each.__module__.startswith(ours) and each is not Checked]


def overridden(kind):
    """Concrete methods of ancestors that a class writes anew."""
    own = {name for name, value in vars(kind).items() if callable(value) or isinstance(value, property | component)}
    own = {name for name in own if not (name.startswith("__") and name.endswith("__"))}
    inherited = {}
    for base in reversed(ancestors(kind)):
        inherited |= {
            name: value for name, value in vars(base).items() if callable(value) or isinstance(value, property)
        }
    concrete = {name for name, value in inherited.items() if not getattr(value, "__isabstractmethod__", False)}
    return (own & concrete) - DEFAULTS


def components_of_ours():
    kinds = {type(each) for kind in ALGORITHMS.values() for each in modules_in(kind()).values()}
    return sorted((kind for kind in kinds if issubclass(kind, Component)), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", ALGORITHMS.values())
def test_an_algorithm_derives_from_the_contract_alone(kind):
    assert ancestors(kind) == [fb.Algorithm]
    assert kind.__final__


@pytest.mark.parametrize("kind", [*ALGORITHMS.values(), *components_of_ours()])
def test_no_concrete_method_is_overridden(kind):
    assert overridden(kind) == set()
    assert len(ancestors(kind)) <= 2


def test_what_overrides_is_found():
    assert overridden(_Derived) == {"told"} and len(ancestors(_Derived)) == 2


@pytest.mark.parametrize("kind", ALGORITHMS.values())
def test_fields_stand_in_the_class(kind):
    facts = [name for name in kind.__annotations__ if name not in ("about", "follows")]
    assert facts == [field.name for field in dataclasses.fields(kind)]


@pytest.mark.parametrize("kind", ALGORITHMS.values())
def test_a_file_holds_one_algorithm_and_its_typed_state(kind):
    file = inspect.getsourcefile(kind)
    assert file is not None and Path(file).parent == HERE
    classes = [node.name for node in ast.parse(Path(file).read_text()).body if isinstance(node, ast.ClassDef)]
    assert [name for name in classes if name in {each.__name__ for each in ALGORITHMS.values()}] == [kind.__name__]
    state = kind().init(X, Y)
    assert isinstance(state, eqx.Module) and type(state).__module__ in (kind.__module__, "fedbilevel.algorithm")
    held = [getattr(state, field.name) for field in dataclasses.fields(state) if field.name not in ("x", "y")]
    assert not any(isinstance(each, dict) and jax.tree.structure(each) != jax.tree.structure(Y) for each in held)


@pytest.mark.parametrize("file", sorted(HERE.rglob("*.py")), ids=lambda file: str(file.relative_to(HERE)))
def test_files_are_short(file):
    assert len(file.read_text().splitlines()) <= 260


@pytest.mark.parametrize("options", [{"one_round": True}, {"independent_cohorts": True}, {"warm_start_v": True}])
def test_a_variant_is_a_component_chosen_by_the_constructor(options):
    plain = fb.AggITD(truncation="full")
    variant = fb.AggITD(truncation="full", **options)
    assert type(variant) is fb.AggITD
    chosen = [(type(variant.turns), type(plain.turns)), (type(variant.terms), type(plain.terms))]
    assert any(one is not other for one, other in chosen)
    assert {type(variant.turns).__module__, type(variant.terms).__module__} & {"fedbilevel.algorithms.aggitd_ours"}


def test_components_are_no_fields_and_steps_stand_once():
    algorithm = fb.AggITD(inner_lr=0.3)
    assert algorithm.turns.inner_lr == 0.3 and "turns" not in {f.name for f in dataclasses.fields(algorithm)}
    assert jax.tree.leaves(algorithm).count(0.3) == 1
    assert dataclasses.replace(algorithm, inner_lr=0.4).turns.inner_lr == 0.4
    moved = eqx.tree_at(lambda a: a.inner_lr, algorithm, 0.5)
    assert moved.turns.inner_lr == 0.5
