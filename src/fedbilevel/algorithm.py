"""The contract of an algorithm: a server program, and the named client methods that it calls.

An `Algorithm` is an equinox module. Step sizes are leaves (a grid of them is a vmap, a new value does not recompile);
loop counts and batch sizes are static. `step` runs at the server and reaches the clients only through `fed`; a client
method is any public method that takes `(client, *message)` and returns a reply, or `Reply(reply, state)`.

What several algorithms share is a `Component`: a module with client methods of its own and, where it remembers something, a
typed state that the algorithm keeps for it. An algorithm makes its components from its fields (`component`), so that a step
size stands in one place: in the field that users set. Their client methods are named by their path, as in `lower.gradient`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from .component import component as component
from .component import modules_in as modules_in
from .errors import InputError, check
from .federation import Federation
from .given import as_whole
from .jaxprs import Tracer

Setting = float | int | str | bool | tuple[int, ...] | None  # what a field may be given, as plain values
Default = TypeVar("Default")  # of a field: for a type checker, the field is what its default is
Given = ArrayLike | str | None


class State(eqx.Module):
    """What the next iteration needs: the upper variable x and the lower variable y."""

    x: PyTree
    y: PyTree


class Info(eqx.Module):
    """Diagnostics of one iteration; every scalar becomes a column of the history, empty where it is None.

    They are made of what travels anyway. None: not measured, for the algorithm does not send it.

    Attributes:
        hypergradient_norm: Euclidean norm of the iteration's hypergradient estimate.
        vector_growth: how much the Hessian factors (I - hessian_lr H) stretched the vector they were applied to;
            above one the Hessian step is too large.
        vector_residual: |H v - d_y f| / |d_y f|, how far v is from H^{-1} d_y f. Where only the difference travels,
            the |d_y f| is that of the first iteration, in which v = 0.
        lower_gradient_norm: |d_y g|, how far y is from y*(x).
    """

    hypergradient_norm: Float[Array, ""]
    vector_growth: Float[Array, ""] | None = None
    vector_residual: Float[Array, ""] | None = None
    lower_gradient_norm: Float[Array, ""] | None = None


def rate(default: Default, *words: str, why: str = "") -> Default:
    """A field that holds a step size: positive, a leaf; or one of the words; or None, where that is the default.

    Args:
        why: why it cannot be found while running, where others of its kind can.
    """
    metadata = {"role": "rate", "words": words if default is not None else (*words, None), "why": why}
    return eqx.field(default=default, converter=_as_float, metadata=metadata)


def count(default: Default) -> Default:
    """A field that holds how often something is done, or how many rows are drawn: at least one, static."""
    metadata = {"role": "count", "optional": default is None}
    return eqx.field(default=default, static=True, converter=_as_count, metadata=metadata)


def option(default: Default) -> Default:
    """A field that holds a choice: static."""
    return eqx.field(default=default, static=True, metadata={"role": "option"})


def choice(default: Default, converter: Callable[..., Setting] | None = None) -> Default:
    """A field that holds a choice which the algorithm checks itself: static."""
    extra = {} if converter is None else {"converter": converter}
    return eqx.field(default=default, static=True, **extra)


def _as_count(value: Given) -> Given:
    number = as_whole(value)
    array = isinstance(value, np.bool_ | np.ndarray | jax.Array)
    if number is None and array and value.dtype == np.bool_ and value.size == 1:
        return bool(value)  # refused, and no array in a static field
    return value if number is None else number


def _as_float(value: Given) -> Given:
    return float(value) if isinstance(value, (int, float, np.generic)) and not isinstance(value, bool) else value


def _is_word(value: Given, words: tuple[str | None, ...]) -> bool:
    return (value is None or isinstance(value, str)) and value in words


def _is_step(value: Given) -> bool:
    """Whether it is a positive number, or an array of them (a grid of step sizes, which is mapped over)."""
    if isinstance(value, float):
        return bool(np.isfinite(value) and value > 0)
    if not (isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating)):
        return False
    return bool(jnp.all(jnp.isfinite(value) & (value > 0)))


@dataclasses.dataclass(frozen=True)
class About:
    """What there is to know about an algorithm before it runs: lists, tables, pages and tests are made of it.

    Attributes:
        name: on the command line.
        rounds: of one iteration, the most where the server draws: a sum of whole numbers, T (`inner_rounds`) and N
            (`neumann_terms`, or `inner_rounds` where there are none), with truncation="full".
        when: when to use it.
        hypergradient: how its hypergradient lies to the true one.
        lower: where its lower level ends.
        order: of the derivatives that it asks for, "first" or "second".
        asks: "cohort", or "all" where an exchange asks everybody.
        biased: whether its hypergradient is made of the clients' own Hessians, and biased where clients differ.
        busy: settings for the conformance suite, where every option is to be at work, beside the usual ones.
        exact: those that make `estimate` exact, beside the usual ones; None where it cannot be.
        no_blocks: why leaves of x or y that belong to clients (`per_client`) are refused; empty where they are taken.
    """

    name: str
    rounds: str
    when: str
    hypergradient: str
    lower: str
    order: str = "second"
    asks: str = "cohort"
    biased: bool = False
    busy: Mapping[str, Setting] = dataclasses.field(default_factory=dict)
    exact: Mapping[str, Setting] | None = None
    no_blocks: str = ""


class Checked(eqx.Module):
    """Fields made by `rate`, `count` and `option`, checked when they are set and shown by name."""

    def __check_init__(self):
        for field in dataclasses.fields(self):
            value, role = getattr(self, field.name), field.metadata.get("role")
            where = f"{type(self).__name__}({field.name}=...)"
            words = field.metadata.get("words", ())
            if role == "rate" and not isinstance(value, Tracer) and not _is_word(value, words):
                good = _is_step(value)
                choice = "".join(f" or {word!r}" for word in words)
                check(good, f"{where} is a step size, a positive number{choice}; got {value!r}.")
            if role == "count" and not (value is None and field.metadata["optional"]):
                good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
                check(good, f"{where} is a count, a whole number of at least 1; got {value!r}.")

    def __repr__(self) -> str:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in fields.items())})"


class Component(Checked):
    """A piece that algorithms share: fields, client methods, and perhaps a state that the algorithm keeps for it."""


class Algorithm(Checked):
    """Base of every algorithm; a subclass declares its fields with `rate`, `count` and `option`, which are checked.

    Subclasses write `step`, their client methods, and where they have an estimator of the hypergradient, `estimate`. Where
    clients have lower variables of their own, `own_lower(state)` finds one, like y, in the state that its client keeps:
    `solve` returns every client's, and takes their mean for y; `shares_lower` says whether the server knows that mean.

    Attributes:
        follows: which setting moves which part of the state: "x", "y", another attribute of the state, or an entry of a
            dict or tuple in it ("control.1"). A run that blows up names its setting by it.
        about: the facts of one that ships with the library.
        paced: whether its steps, where they are "auto", are found around it (`pace.automatic`); else it finds them itself.
    """

    about: ClassVar[About]
    paced: ClassVar[bool] = True
    follows: ClassVar[dict[str, str]] = {"x": "outer_lr", "y": "inner_lr", "v": "hessian_lr"}

    @property
    def spares_unasked(self) -> bool:
        """Whether an iteration neither moves the blocks (`per_client`) of clients that it does not ask, nor makes numbers of
        them, and asks cohorts as they are drawn: then `Simulation` touches the others alone. False: it touches all.

        All blocks of the state are meant, whatever holds them. A step of an optimizer, whose momentum fades, or a norm of
        the whole y is not of that kind; sums of replies are, which are zero for those who were not asked.
        """
        return False

    def init(self, x: PyTree, y: PyTree) -> PyTree:
        """The state before the first iteration; it must have the fields `x` and `y`."""
        return State(x, y)

    def begun_again(self, state: PyTree) -> PyTree:
        """The state from which a run goes on where clients have lost theirs, and have what `client_init` gives."""
        return self.init(state.x, state.y)

    def client_init(self, x: PyTree, y: PyTree) -> PyTree:
        """The state every client starts with and keeps between exchanges (control variates, say); None if it keeps none."""
        return None

    @abc.abstractmethod
    def step(self, fed: Federation, state: PyTree) -> tuple[PyTree, PyTree]:
        """One outer iteration at the server: (the next state, the iteration's diagnostics).

        The diagnostics are `Info`, or a dict of scalars of your own: each becomes a column of the history.
        """

    def estimate(self, fed: Federation, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        """(hypergradient estimate like x, the lower variable y after its rounds), without moving x.

        Raises:
            InputError: the algorithm never forms a hypergradient.
        """
        raise InputError(f"{type(self).__name__} never forms a hypergradient, so there is none to estimate.")


class Truncation(eqx.Module):
    """Where the Neumann series is cut: "uniform" (drawn by the server), "full" (all terms summed), or a fixed int.

    The int is a leaf, so that a new one does not recompile.
    """

    mode: str = eqx.field(static=True)
    value: int | np.integer | Int[Array, ""] | None = None

    def __init__(self, choice: str | int | np.integer | Int[Array, ""] | Truncation):
        if isinstance(choice, Truncation):
            self.mode, self.value = choice.mode, choice.value
        elif isinstance(choice, str) and choice in ("uniform", "full"):
            self.mode, self.value = choice, None
        else:
            whole = isinstance(choice, (int, np.integer)) and not isinstance(choice, bool)
            whole = whole or (isinstance(choice, jax.Array) and jnp.issubdtype(choice.dtype, jnp.integer))
            check(whole, f"truncation= is 'uniform', 'full' or a whole number; got {choice!r}.")
            assert not isinstance(choice, str)  # or it would not be whole
            self.mode, self.value = "fixed", choice

    def __repr__(self) -> str:
        return repr(self.mode if self.mode != "fixed" else self.value)

    @property
    def full(self) -> bool:
        """Whether all terms are summed."""
        return self.mode == "full"

    def draw(self, fed: Federation, most: int) -> Int[Array, ""]:
        """The number that cuts the series: in {0, ..., most}, uniform or fixed."""
        return fed.randint(0, most + 1) if self.mode == "uniform" else jnp.asarray(self.value, jnp.int32)

    def check_range(self, owner: str, most: int) -> None:
        """Refuse a fixed number outside {0, ..., most}."""
        if self.value is not None and not isinstance(self.value, Tracer):
            good = 0 <= int(self.value) <= most
            check(good, f"{owner}(truncation=...) as a number lies in 0..{most}; got {self.value}.")
