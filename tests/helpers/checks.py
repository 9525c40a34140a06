"""How annotations are checked while tests run, and where they are not.

pytest has jaxtyping decorate the library as it is imported (pyproject.toml: --jaxtyping-packages): what is annotated is
checked at every call, and dataclasses when they are made. Processes that tests start go without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

checked: Callable[..., Any] = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do for a float


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
