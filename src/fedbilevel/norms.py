"""Layers of flax that would mean something else in a loss of rows: refused while a loss is traced.

Batch normalisation takes statistics of what it is given, which is one row, or rows and padding, and renews its own. Dropout
of flax.nnx draws from a key of its own, which a traced loss cannot count on: every row would have one mask. equinox refuses
both by itself. Nothing here imports flax: what was not imported is in no loss.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator

from jaxtyping import PyTree

from .errors import InputError

_INSTEAD = "let it use its running statistics, or take GroupNorm or LayerNorm, which look at one row"
_RAISED = {  # what the libraries raise in such a loss, by a part of the message
    "unbound axis name": f"(batch normalisation over an axis of rows? The library takes rows one by one: {_INSTEAD})",
    "from a different trace level": (
        f"(a flax.nnx module that changes in the loss? Call model.eval() before, and {_INSTEAD}; hand dropout the key)"
    ),
}


def explained(error: Exception) -> str:
    """What a loss raised, in one line, with what to do where such a layer did."""
    text = str(error).strip()
    reason = text.splitlines()[0] if text else ""
    hint = next((f" {hint}" for part, hint in _RAISED.items() if part in text), "")
    return f"{type(error).__name__}: {reason}{hint}" if reason else type(error).__name__


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Within it, such layers of flax raise.

    Raises:
        InputError: one is called.
    """
    with contextlib.ExitStack() as stack:
        linen, nnx = sys.modules.get("flax.linen"), sys.modules.get("flax.nnx")
        if linen is not None:
            stack.enter_context(linen.intercept_methods(_intercepted))
        if nnx is not None:
            stack.enter_context(_looked_at(nnx.BatchNorm, _check_running))
            stack.enter_context(_looked_at(nnx.Dropout, _check_handed))
        yield


@contextlib.contextmanager
def _looked_at(kind: type, look: Callable[..., None]) -> Iterator[None]:
    """Within it, calls of a kind of layer are looked at first: flax.nnx has nothing like linen's interceptors."""
    before = kind.__call__

    @functools.wraps(before)
    def call(layer: PyTree, *args: PyTree, **named: PyTree) -> PyTree:
        look(layer, *args, **named)
        return before(layer, *args, **named)

    kind.__call__ = call  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        kind.__call__ = before  # pyright: ignore[reportAttributeAccessIssue]


def _intercepted(method: Callable, args: tuple, named: dict, context: PyTree) -> PyTree:
    if context.method_name == "__call__" and type(context.module).__name__ == "BatchNorm":
        _check_running(context.module, *args, **named)
    return method(*args, **named)


def _check_running(layer: PyTree, _: PyTree, use_running_average: bool | None = None, **__: PyTree) -> None:
    running = layer.use_running_average if use_running_average is None else use_running_average
    if not running:
        name = getattr(layer, "name", None) or "BatchNorm"
        raise InputError(f"the layer {name} of flax takes statistics of a batch, and a loss is of rows: {_INSTEAD}.")


def _check_handed(
    layer: PyTree, _: PyTree, *, deterministic: bool | None = None, rngs: PyTree = None, **__: PyTree
) -> None:
    still = layer.deterministic if deterministic is None else deterministic
    if not still and layer.rate > 0 and rngs is None:
        raise InputError(
            "a Dropout of flax.nnx draws from its own key, so that all rows would have one mask: hand it the key of the "
            "row, dropout(h, deterministic=key is None, rngs=key), in a Problem(..., random=True), or call model.eval()."
        )
