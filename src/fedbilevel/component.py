"""Modules in modules: components, made from a module's fields, and the paths of all that a module holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Generic, TypeVar, overload

import equinox as eqx

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
