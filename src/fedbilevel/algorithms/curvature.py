"""The old base of the algorithms that are still to be made of components; `components/curvature.py` is what stays."""

from __future__ import annotations

from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from ..algorithm import Algorithm, State, component
from ..federation import Federation
from .components import curvature, diagnostics
from .components.curvature import EVERY as EVERY
from .components.curvature import HALVINGS as HALVINGS
from .components.diagnostics import of_each as of_each
from .components.lanczos import STEPS as STEPS
from .components.lanczos import extend as extend
from .components.lanczos import krylov as krylov
from .components.lanczos import largest_ritz_value as largest_ritz_value


class Keeping(State):
    """A state that holds more than x and y, by name."""

    kept: dict[str, PyTree]


def kept_in(state: State) -> dict[str, PyTree]:
    """What a state holds besides x and y."""
    return state.kept if isinstance(state, Keeping) else {}


def keeping(x: PyTree, y: PyTree, kept: dict[str, PyTree]) -> State:
    """The state of x, y and what else is kept."""
    return Keeping(x, y, kept) if kept else State(x, y)


def residual(kept: dict[str, PyTree], now: Any, first: Any = None) -> tuple[Any, dict[str, PyTree]]:
    """`components.diagnostics.residual` with what is kept. A state that was not begun at v = 0 has none: None."""
    if "pull" not in kept:
        return None, kept
    lag, pull = diagnostics.residual(kept["pull"], now, first)
    return lag, {**kept, "pull": pull}


class AutoStep(Algorithm):
    """The setting `hessian_lr`, a number or "auto", and what the clients are asked for the latter."""

    hessian_lr: eqx.AbstractVar[Any]
    batch_size: eqx.AbstractVar[int | None]

    @component
    def hessian(self) -> curvature.AutoStep:
        return curvature.AutoStep(self.hessian_lr, self.batch_size, self.local_factors)

    def init(self, x: PyTree, y: PyTree) -> Any:
        return keeping(x, y, self.keeps(x, y))

    def keeps(self, x: PyTree, y: PyTree) -> dict[str, PyTree]:
        """What the state holds besides x and y, at the start."""
        return {"curvature": self.hessian.begin(y)} if self.measures_curvature else {}

    @property
    def measures_curvature(self) -> bool:
        """Whether the step is found while running."""
        return self.hessian.measures

    @property
    def local_factors(self) -> bool:
        """Whether several factors of a single client's own act before the next average, or one client's alone."""
        return False

    def hessian_step(self, fed: Federation, state: State) -> tuple[Any, dict[str, PyTree]]:
        """(lam as it travels in messages: None if it is configured; what the state keeps)."""
        kept = kept_in(state)
        if not self.measures_curvature:
            return None, kept
        lam, memory = self.hessian.ask(fed, state.x, state.y, kept["curvature"])
        return lam, {**kept, "curvature": memory}

    def watch(self, kept: dict[str, PyTree], size: Any = None) -> dict[str, PyTree]:
        """What the state keeps after an iteration, with how long it left the vector: v, or what was made of it."""
        if not self.measures_curvature:
            return kept
        return {**kept, "curvature": self.hessian.watch(kept["curvature"], kept.get("v", size))}

    def lam(self, sent: Any) -> Any:
        """The step of the Hessian factors: the one that came with the message, or else the configured one."""
        return self.hessian.lam(sent)
