"""Modules in modules: components, made from a module's fields, the paths of all that a module holds, and methods by path."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Generic, TypeVar, overload

import equinox as eqx
import jax
from jaxtyping import PyTree

Made = TypeVar("Made")


class component(Generic[Made]):  # noqa: N801  it is used as `property` is
    """A component of an algorithm, made from the algorithm's fields and kept with it.

        @component
        def lower(self) -> CorrectedLower:
            return CorrectedLower(self.inner_rounds, self.inner_lr, self.local_steps)

    It is no field: the settings are, and a grid of step sizes, `dataclasses.replace` and `--set` find each of them once.
    """

    def __init__(self, make: Callable[..., Made]):
        self._make, self.__doc__ = make, make.__doc__

    def __set_name__(self, owner: type, name: str):
        self._name = name

    @overload
    def __get__(self, owner: None, kind: type) -> component[Made]: ...

    @overload
    def __get__(self, owner: eqx.Module, kind: type) -> Made: ...

    def __get__(self, owner: eqx.Module | None, kind: type) -> component[Made] | Made:
        if owner is None:
            return self
        made = vars(owner)[self._name] = self._make(owner)  # from now on found there; no leaf of the module
        return made


def modules_in(module: eqx.Module, path: str = "") -> dict[str, eqx.Module]:
    """The modules within a module, its components and those in its fields, by their path."""
    fields = [field.name for field in dataclasses.fields(module)]
    made = [name for kind in type(module).__mro__ for name, each in vars(kind).items() if isinstance(each, component)]
    found: dict[str, eqx.Module] = {}
    for name in dict.fromkeys((*fields, *made)):
        each = getattr(module, name)
        if isinstance(each, eqx.Module):
            found |= {path + name: each} | modules_in(each, f"{path}{name}.")
    return found


def method_named(module: eqx.Module, name: str) -> Callable:
    """The method of that name: the module's own, or (with a path before it) that of a module in it.

    A module that stands for another one says itself what it has: by `client_method`.
    """
    own = getattr(type(module), "client_method", None)
    return operator.attrgetter(name)(module) if own is None else own(module, name)


class MethodOf:
    """A method of a module that says itself what it has (`client_method`), by name: bound to it, as others are."""

    def __init__(self, owner: eqx.Module, name: str):
        self.__self__, self.__name__ = owner, name

    def __call__(self, *args: PyTree) -> PyTree:
        return method_named(self.__self__, self.__name__)(*args)


def path_of(owner: object, module: eqx.Module) -> str | None:
    """Where in a module another one is: "" for itself, else a path that ends in a dot; None: it is none of it.

    Of several of one kind it is the one that holds the same values.
    """
    if type(owner) is type(module):
        return ""
    for name, each in vars(module).items():  # its own components and fields, without a search
        if each is owner:
            return f"{name}."
    if not isinstance(owner, eqx.Module):
        return None
    alike = {path: each for path, each in modules_in(module).items() if type(each) is type(owner)}
    same = [path for path, each in alike.items() if _same(each, owner)]
    return next((f"{path}." for path in (*same, *alike)), None)


def _same(one: eqx.Module, other: eqx.Module) -> bool:
    (leaves, structure), (others, theirs) = jax.tree.flatten(one), jax.tree.flatten(other)
    return structure == theirs and all(a is b for a, b in zip(leaves, others, strict=True))


def title_of(module: eqx.Module) -> str:
    """What users know a module by: its class, or that of the one which it stands for."""
    stands_for = hasattr(type(module), "client_method")  # a title alone may be a setting of the user's
    return module.title if stands_for else type(module).__name__  # pyright: ignore[reportAttributeAccessIssue]
