"""Which setting made a run blow up: found by repeating the stretch in which it did, with one setting changed at a time.

First x is held where it is. Then y moves by itself, and v (or what else stands for H^{-1} d_y f) after y: the first of them
that leaves its range, or whose steps grow, names its step. If none does, it is x's. The step that is found must cure: a
thousand times lower, it alone keeps everything finite. Where it does not, the one that does is named.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeGuard, TypeVar

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import PyTree

from ..algorithm import Algorithm
from ..engines.base import Carry, Execution
from ..pace.automatic import found_in, numbered, stands_in
from ..watch import attributes

LEAST, _MOST = 50, 200  # iterations repeated
_UNSETTLED = 10.0  # how much the steps of a part grow, at least, where it diverges (noise keeps them alike)
_STRETCHED = 1.05  # a Hessian factor with a usable step never stretches; the margin is for rounding and minibatches
_LOWER = 1e-3  # how much lower a step is made, to see whether it cures
_HELD = 1e-30  # of outer_lr: x stays where it is, and what is measured relative to the step is finite
_FAR = 30.0  # how far a setting that is no step lies from its default to be suspected before the steps are
_SMALL = 1e-6  # moves of this share of a part's size may grow as they like

Kind = TypeVar("Kind", bound=Algorithm)
Optimizer = optax.GradientTransformation | str  # optax's own, or its name and learning rate


@dataclasses.dataclass(frozen=True)
class Blame:
    """A setting, and why it is the cause; `instead` is a value of it that was seen to work, where it is no step."""

    field: str
    why: str
    instead: float | None = None


@dataclasses.dataclass(frozen=True)
class Replayed:
    """What a repeated stretch did: whether it stayed finite, and by part the sizes and moves of each iteration."""

    finite: bool
    sizes: dict[str, np.ndarray]
    moves: dict[str, np.ndarray]
    growth: float  # of the vector that Hessian factors act on; zero where not measured


class Replays:
    """The stretch in which a run blew up, to be repeated with other settings from where it was last in order."""

    def __init__(self, execution: Execution, algorithm: Algorithm, start: Carry, failed: Carry, limit: float):
        self.execution, self.algorithm, self.start, self.limit = execution, algorithm, start, limit
        self._failed = failed.state
        self.length = min(max(failed.iteration - start.iteration, LEAST), _MOST)
        self.follows = followed(algorithm)

    def run(self, algorithm: Algorithm) -> Replayed:
        """Repeat it with these settings."""
        _, record = self.execution.advance(algorithm, self._begin(algorithm), self.length, self.limit)
        seen, growth = record.seen, getattr(record.info, "vector_growth", None)
        assert seen is not None
        with np.errstate(invalid="ignore"):
            late = np.atleast_1d(0.0 if growth is None else growth)[record.done // 2 :]  # at first y settles
            largest = float(np.max(late, initial=0.0))
        sizes, moves = ({name: np.asarray(v) for name, v in of.items()} for of in (seen.sizes, seen.moves))
        return Replayed(record.finite, sizes, moves, largest)

    def _begin(self, algorithm: Algorithm) -> Carry:
        """Where it starts: what the state holds of settings is these settings'."""
        state = self.start.state
        held = [name for name in attributes(state) if name in rates(algorithm)]
        for name in held:
            value = rates(algorithm)[name]
            state = eqx.tree_at(
                lambda s, name=name: attributes(s)[name], state, replace_fn=lambda a, v=value: a * 0 + v
            )
        return dataclasses.replace(self.start, state=state)

    def cures(self, field: str, value: float | None = None) -> bool:
        """Whether everything stays in its range once this setting alone is changed, by default much lowered."""
        return self.remains(field, value) <= math.sqrt(self.limit)

    def remains(self, field: str, value: float | None = None) -> float:
        """How large the state is in the end once this setting alone is changed; infinite if it blows up all the same."""
        replay = self.run(changed(self.algorithm, field, value))
        return max(float(size[-1]) for size in replay.sizes.values()) if replay.finite else np.inf

    def blame(self) -> Blame:
        """The setting that made it blow up."""
        for setting in [*grown(self.algorithm, self._failed), *suspects(self.algorithm, _FAR)]:
            if self.cures(setting.field, setting.instead):
                return setting
        first = self._first()
        if first is None or self.cures(first.field):
            return first or Blame("", "")
        remain = {field: self.remains(field) for field in self._others(first.field)}
        best = min(remain, key=lambda field: remain[field], default="")
        if best and remain[best] <= np.sqrt(self.limit):
            return Blame(best, f"a thousand times lower, {best} alone keeps everything finite")
        for setting in suspects(self.algorithm, 1.0):
            if self.cures(setting.field, setting.instead):
                return setting
        return first

    def _first(self) -> Blame | None:
        """What blows up while x is held where it is, or else what moves x."""
        lower, vector = self.follows.get("y"), self.follows.get("v")
        if self.follows.get("x") is None:
            return Blame(lower or vector or "", "") if lower or vector else None
        held = self.run(x_held(self.algorithm, self.follows))
        out = [part for part in held.sizes if part != "x" and self._leaves(held, part)]
        if lower and any(self.follows.get(part) == lower for part in out):
            return Blame(lower, "with x held fixed the lower rounds alone blow up")
        if vector and held.growth > _STRETCHED:
            why = f"the Hessian factors (I - {vector} H) stretch their vector {held.growth:.3g}-fold"
            return Blame(vector, why)
        if vector and (out or not held.finite):
            return Blame(vector, "with x held fixed y stays finite, and v or what is made of it does not")
        return self._of_x(held, vector)

    def _of_x(self, held: Replayed, vector: str | None) -> Blame:
        upper, optimizer = self.follows["x"], self.follows.get("optimizer")
        seen = held.growth > 0 or any(self.follows.get(part) == vector for part in held.sizes)
        lower = vector and number(self.algorithm, vector) / 10
        if vector and lower and not seen and self.cures(vector, lower) and not self.cures(upper):
            return Blame(vector, f"ten times lower, {vector} keeps everything finite")  # v is made anew each time
        why = "with x held fixed everything stays finite"
        if optimizer and gain(getattr(self.algorithm, optimizer)) > number(self.algorithm, upper):
            return Blame(optimizer, why)
        return Blame(upper, why)

    def _leaves(self, replay: Replayed, part: str) -> bool:
        sizes, moves = replay.sizes[part], replay.moves[part]
        if not sizes[-1] <= self.limit:
            return True
        grown = moves[-1] / moves[0] if moves[0] > 0 else moves[-1]
        return bool(grown > _UNSETTLED and moves[-1] > _SMALL * max(1.0, sizes[-1]))

    def _others(self, found: str) -> list[str]:
        """The other steps, those of single parts before those of all."""
        named = [self.follows[part] for part in ("v", "y", "x", "optimizer") if part in self.follows]
        order = dict.fromkeys([*named, *rates(self.algorithm)])
        return [field for field in order if field != found and is_step(self.algorithm, field)]


# Settings ---------------------------------------------------------------------------------------------------------------


def fields_of(algorithm: Algorithm) -> list[dataclasses.Field]:
    """Its settings, but for steps that are found while it runs."""
    return [f for f in dataclasses.fields(numbered(algorithm)) if f.name not in found_in(algorithm)]


def rates(algorithm: Algorithm) -> dict[str, float]:
    """The algorithm's numbers that are step sizes or the like, by name."""
    fields = [f for f in fields_of(algorithm) if f.metadata.get("role") == "rate"]
    values = {f.name: getattr(algorithm, f.name) for f in fields}
    return {name: float(value) for name, value in values.items() if not (value is None or isinstance(value, str))}


def followed(algorithm: Algorithm) -> dict[str, str]:
    """`Algorithm.follows`, of the settings that it has; an optimizer only where there is one."""
    names = {f.name for f in fields_of(algorithm)}
    there = {part: field for part, field in algorithm.follows.items() if field in names}
    return {part: field for part, field in there.items() if getattr(algorithm, field) is not None}


def is_step(algorithm: Algorithm, field: str) -> bool:
    """Whether a setting is a step: lower is safer. An optimizer counts, for it has a learning rate."""
    moving = {algorithm.follows.get(part) for part in ("x", "y", "v")}
    return field == algorithm.follows.get("optimizer") or (
        field in rates(algorithm) and (field.endswith("_lr") or field in moving)
    )


def number(algorithm: Algorithm, field: str) -> float:
    """A setting's value; zero for one that is found while running."""
    return rates(algorithm).get(field, 0.0)


def suspects(algorithm: Algorithm, far: float) -> list[Blame]:
    """Settings that are no steps and lie at least this far from their defaults."""
    found = []
    for field in fields_of(algorithm):
        value, default = number(algorithm, field.name), field.default
        if is_step(algorithm, field.name) or not isinstance(default, float) or value in (0.0, default):
            continue
        if max(value / default, default / value) >= far:
            why = f"with {field.name} = {default:g}, its default, everything stays finite"
            found.append(Blame(field.name, why, default))
    return found


def grown(algorithm: Algorithm, state: PyTree) -> list[Blame]:
    """Settings by which something in the state has grown far beyond what it began with."""
    found = []
    for part, field in followed(algorithm).items():
        if is_step(algorithm, field) or field not in rates(algorithm) or part not in rates(algorithm):
            continue
        begun, now = number(algorithm, part), float(np.asarray(attributes(state)[part]))
        if now > _FAR * begun:
            why = f"{part} has grown from {begun:g} to {now:g}, and where it does not everything stays finite"
            found.append(Blame(field, why, _LOWER * number(algorithm, field)))
    return found


def changed(algorithm: Kind, field: str, value: float | None = None) -> Kind:
    """The algorithm with another value of a setting, by default a much lower one."""
    now = getattr(algorithm, field)
    if field not in rates(algorithm):
        return with_settings(algorithm, {field: slowed(now, _LOWER)}) if isinstance_optimizer(now) else algorithm
    return eqx.tree_at(lambda a: getattr(a, field), algorithm, float(now) * _LOWER if value is None else value)


def with_settings(algorithm: Kind, settings: Mapping[str, Optimizer]) -> Kind:
    """The algorithm with other settings; one that stands for another has them there."""
    within = stands_in(algorithm)
    if within is not None:
        return dataclasses.replace(algorithm, algorithm=with_settings(within, settings))
    return dataclasses.replace(algorithm, **settings)


def x_held(algorithm: Kind, follows: dict[str, str]) -> Kind:
    """The algorithm with an x that stays where it is."""
    upper, optimizer = follows["x"], follows.get("optimizer")
    held = changed(algorithm, upper, _HELD)
    return held if optimizer is None else with_settings(held, {optimizer: slowed(getattr(held, optimizer), 0.0)})


# Optimizers of x --------------------------------------------------------------------------------------------------------


def isinstance_optimizer(value: Any) -> TypeGuard[Optimizer]:
    """Whether a setting holds an optimizer, as optax's or by name."""
    return isinstance(value, (optax.GradientTransformation, str)) and value != "auto"


def slowed(optimizer: Optimizer, factor: float) -> optax.GradientTransformation:
    """The optimizer with its steps scaled; its state stays as it is."""
    from ..algorithms.components.optimizer import resolve

    own = resolve(optimizer, "")
    assert own is not None  # it is asked for where there is one

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = own.update(updates, state, params, **extra)
        return jax.tree.map(lambda leaf: leaf * np.asarray(factor, leaf.dtype), updates), state

    return optax.GradientTransformation(own.init, update)


def gain(optimizer: Optimizer) -> float:
    """How far the optimizer goes along a gradient of one: its learning rate, for those that do not scale gradients."""
    from ..algorithms.components.optimizer import resolve

    own, one = resolve(optimizer, ""), np.ones(1, np.float32)
    assert own is not None
    with jax.numpy_dtype_promotion("standard"):
        step, _ = own.update(one, own.init(one), one)
    return float(np.max(np.abs(np.asarray(step))))
