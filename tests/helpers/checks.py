"""How annotations are checked while tests run, and where they are not.

conftest.py has jaxtyping decorate the library as it is imported: what is annotated is checked at every call, and
dataclasses when they are made. Processes that tests start go without, and JAXTYPING_DISABLE=1 turns it off.

jaxtyping's own decorator binds the arguments of every call and has them checked twice; functions within functions it
makes anew whenever these are called. Half of the time of some tests went there, so that functions have a decorator of
ours, which checks the same: beartype, and a room of its own for the names of shapes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import jaxtyping._decorator
from beartype import BeartypeConf, beartype

checked: Callable[..., Any] = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do for a float
_jaxtyped = jaxtyping.jaxtyped
_known: dict[types.CodeType, tuple[Any, bool]] = {}


def _decorated(function: Any = None, **how: Any) -> Any:
    """`jaxtyping.jaxtyped`, quicker for functions; classes, properties and the like are taken apart by the original."""
    if function is None:
        return functools.partial(_decorated, **how)
    if not inspect.isfunction(function):
        _say_what_bases_meant(function)
        return _jaxtyped(function, **how)
    sure, named = _checked_once(function)
    if sure is function:  # nothing is annotated
        return function

    @functools.wraps(function)
    def switched(*args: Any, **words: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **words)
        if not named:
            return sure(*args, **words)
        with _jaxtyped("context"):
            return sure(*args, **words)

    return switched


def _say_what_bases_meant(kind: Any) -> None:
    """The fields that a dataclass has from bases are annotated in words of the modules that these are in."""
    notes = getattr(getattr(kind, "__init__", None), "__annotations__", None)
    if not dataclasses.is_dataclass(kind) or not isinstance(kind, type) or notes is None:
        return
    for base in kind.__mro__[1:]:
        for name, words in vars(base).get("__annotations__", {}).items():
            if isinstance(words, str) and notes.get(name) == words:
                notes[name] = eval(words, vars(sys.modules[base.__module__]))


def _checked_once(function: types.FunctionType) -> tuple[Any, bool]:
    """(The function with checks, whether shapes have names in its annotations); beartype writes them once for each text."""
    code = function.__code__
    if code not in _known:
        sure = checked(function)
        _known[code] = (None if sure is function else _copied(sure, None)), _names_shapes(function)
    sure, named = _known[code]
    return (function, False) if sure is None else (_copied(sure, function), named)


def _copied(sure: types.FunctionType, function: Any) -> types.FunctionType:
    """What beartype made, for another function of the same text; it keeps the function as a default of its own."""
    copy = types.FunctionType(sure.__code__, sure.__globals__, sure.__name__, sure.__defaults__, sure.__closure__)
    copy.__kwdefaults__ = {**(sure.__kwdefaults__ or {}), "__beartype_func": function}
    return copy


def _names_shapes(function: Callable[..., Any]) -> bool:
    try:
        hints = typing.get_type_hints(function)
    except NameError:  # of what comes later, or is within a function
        return True
    return any(map(_named, hints.values()))


def _named(hint: Any) -> bool:
    """Whether a shape in the hint has a name, which means the same wherever it stands."""
    if isinstance(hint, list | tuple):
        return any(map(_named, hint))
    shape = getattr(hint, "dim_str", None)
    if isinstance(shape, str):
        return re.search(r"[^\W\d_]", shape) is not None
    tree = inspect.isclass(hint) and issubclass(hint, jaxtyping.PyTree) and hint is not jaxtyping.PyTree
    return tree or any(map(_named, typing.get_args(hint)))


jaxtyping._decorator.jaxtyped = jaxtyping.jaxtyped = _decorated


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """No checks inside."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def unchecked_where_refused(raises: Callable[..., Any]) -> Callable[..., Any]:
    """`pytest.raises`, without checks where the library itself is to refuse: what it is given there is wrong on purpose.

    A checker would refuse it first, in other words than the sentence that the user of the library reads.
    """
    from fedbilevel.errors import InputError, RunError  # not above: the library is decorated with what is here

    @contextlib.contextmanager
    def refused(expected: contextlib.AbstractContextManager[Any]) -> Iterator[Any]:
        with unchecked(), expected as seen:
            yield seen

    def either(kind: Any, **how: Any) -> contextlib.AbstractContextManager[Any]:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        own = any(issubclass(each, InputError | RunError) for each in kinds)
        return refused(raises(kind, **how)) if own else raises(kind, **how)

    return either
