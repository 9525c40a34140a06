"""A look at losses in torch before they run: what would make a run mean something else is refused, by its name.

Each loss is evaluated at the start, on a few rows of the first client, while it is watched: which modules run, whether
anything is drawn, whether buffers, rows or variables change, and which parameters it takes from elsewhere than x and y.
Nothing that it does stays: buffers and torch's generator are as they were.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..errors import InputError, check
from ..problem import describe
from .derivatives import WAYS, At, Way, product
from .tensors import numbers

_WRAPPERS = {
    "DataParallel": "module.module",
    "DistributedDataParallel": "module.module",
    "OptimizedModule": "module._orig_mod",
    "GradSampleModule": "module._module",
    "FullyShardedDataParallel": "module.module",
}


@dataclasses.dataclass
class _Seen:
    """What was seen while a loss ran.

    Attributes:
        running: the modules that are running, the innermost last.
        drawn: (operation, module) of what draws random numbers.
        buffers: (module, name, buffer, its numbers before) of modules that ran.
        wrapped: modules that wrap others.
    """

    running: list[torch.nn.Module] = dataclasses.field(default_factory=list)
    drawn: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    buffers: list[tuple[torch.nn.Module, str, torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=list)
    wrapped: list[torch.nn.Module] = dataclasses.field(default_factory=list)


class _Mode(TorchDispatchMode):
    """A mode of which torch's compiler is not told: 30 MB and half a second of imports for nothing."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _Watching(_Mode):
    """Notes operations that draw."""

    def __init__(self, seen: _Seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            module = f" of the module {type(self.seen.running[-1]).__name__}" if self.seen.running else ""
            self.seen.drawn.append((str(func.overloadpacket).removeprefix("aten."), module))
        return func(*args, **kwargs)


class _Counting(_Mode):
    """Counts floating-point operations."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out, count = func(*args, **(kwargs or {})), flop_registry.get(func.overloadpacket)
        self.operations += 0 if count is None else count(*args, **(kwargs or {}), out_val=out)
        return out


@contextlib.contextmanager
def _watched() -> Iterator[_Seen]:
    """Within it losses are watched; afterwards buffers and torch's generator are as before."""
    seen, state = _Seen(), torch.get_rng_state()

    def before(module: torch.nn.Module, _: Any) -> None:
        seen.running.append(module)
        if type(module).__name__ in _WRAPPERS:
            seen.wrapped.append(module)
        known = {id(buffer) for _, _, buffer, _ in seen.buffers}
        for name, buffer in module.named_buffers(recurse=False):
            if id(buffer) not in known:
                seen.buffers.append((module, name, buffer, buffer.detach().clone()))

    def after(*_: Any) -> None:
        seen.running.pop()

    hooks = register_module_forward_pre_hook(before), register_module_forward_hook(after, always_call=True)
    try:
        with _Watching(seen):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()
        torch.set_rng_state(state)
        with torch.no_grad():
            for _, _, buffer, held in seen.buffers:
                if not torch.equal(buffer, held):
                    buffer.copy_(held)


def look(level: str, at: At) -> None:
    """Refuse a loss that cannot mean what it says.

    Args:
        level: "inner" or "outer".
        at: the loss, where it is looked at; its rows and variables are nobody else's.

    Raises:
        InputError: with what is wrong, and what to do.
    """
    x, y = ([leaf.detach().clone().requires_grad_() for leaf in leaves] for leaves in (at.x, at.y))
    held = [leaf.detach().clone() for leaf in (*x, *y)]
    rows = jax.tree.leaves(at.batch)
    before, draws = [leaf.clone() for leaf in rows], torch.get_rng_state()
    with _watched() as seen:
        try:
            out = at.value(x, y)
        except Exception as error:  # whatever the user's function raises, on whatever shapes
            text = (str(error).strip().splitlines() or [""])[0]
            raise InputError(
                f"the {level} loss failed on {describe(jax.tree.map(numbers, at.batch))}: {type(error).__name__}: {text}"
            ) from error
        drew = not torch.equal(torch.get_rng_state(), draws)
        changed = [(m, name) for m, name, buffer, was in seen.buffers if not torch.equal(buffer, was)]
    _check_modules(level, seen, drew, changed)
    _check_value(level, out)
    same = [
        torch.equal(a, b) for a, b in zip((*rows, *(leaf.detach() for leaf in (*x, *y))), (*before, *held), strict=True)
    ]
    check(all(same), f"the {level} loss changes its rows or variables in place: let it work on a copy, tensor.clone().")
    _check_elsewhere(level, out, [*x, *y])
    again = at.value(x, y)
    check(
        torch.equal(out.detach(), again.detach()) or not torch.isfinite(out),
        f"the {level} loss gives {out.item():.9g} and then {again.item():.9g} for the same variables and rows: it has to "
        "be a function of them alone (no random numbers of Python or numpy, no state that it keeps).",
    )


def _check_modules(level: str, seen: _Seen, drew: bool, changed: list[tuple[torch.nn.Module, str]]) -> None:
    for module in seen.wrapped:
        kind = type(module).__name__
        raise InputError(
            f"the {level} loss runs a module wrapped by {kind}: use the module within, {_WRAPPERS[kind]}, or "
            "fedbilevel.torch.Model(module), which unwraps it."
        )
    if drew and seen.drawn:
        operation, module = seen.drawn[0]
        raise InputError(
            f"the {level} loss draws random numbers ({operation}{module}), which torch.manual_seed would decide: call "
            "module.eval() before (which switches dropout off), or leave that layer out."
        )
    check(not drew, f"the {level} loss draws random numbers, which torch.manual_seed would decide: leave that out.")
    for module, name in changed:
        raise InputError(
            f"the {level} loss changes the buffer {name} of the module {type(module).__name__}, which all clients and "
            "all evaluations would share: call module.eval() before (it then uses the statistics that it has), or use a "
            "layer without, such as GroupNorm or LayerNorm."
        )


def _check_value(level: str, out: Any) -> None:
    shown = f"a {type(out).__name__}"
    if isinstance(out, torch.Tensor):
        shown = f"{str(out.dtype).removeprefix('torch.')}{list(out.shape)}"
    good = isinstance(out, torch.Tensor) and out.shape == () and out.dtype.is_floating_point
    check(
        good,
        f"the {level} loss must return a real floating-point scalar for a batch, the weighted mean over its rows; it "
        f"returned {shown}.",
    )


def _check_elsewhere(level: str, out: torch.Tensor, variables: list[torch.Tensor]) -> None:
    """Refuse trainable tensors in a loss that are in neither x nor y: mostly a module called as it is."""
    ours = {id(leaf) for leaf in variables}
    for leaf in _leaves(out):
        if id(leaf) not in ours:
            raise InputError(
                f"the {level} loss uses a trainable tensor of shape {list(leaf.shape)} that is in neither x nor y, so that "
                "nothing would train it: give the module its parameters, as in torch.func.functional_call(module, y, "
                "inputs), or freeze what is to stay as it is, tensor.requires_grad_(False)."
            )


def _leaves(out: torch.Tensor) -> Iterator[torch.Tensor]:
    """The trainable tensors of which a value was made."""
    if out.grad_fn is None:
        if out.requires_grad:
            yield out
        return
    nodes, met = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node in met:
            continue
        met.add(node)
        if hasattr(node, "variable"):
            yield node.variable  # pyright: ignore[reportAttributeAccessIssue]
        nodes += [follower for follower, _ in node.next_functions if follower is not None]


def way_of(at: At) -> tuple[Way, str]:
    """How second derivatives of the inner loss are taken there, and if in no way, why: the operation, in torch's words."""
    v = [torch.ones_like(leaf) for leaf in at.y]
    why = ""
    for way in WAYS:
        try:
            product(at, v, "y", way)
            product(at, v, "x", way)
            return way, ""
        except (RuntimeError, NotImplementedError) as error:
            why = why or (str(error).strip().splitlines() or [type(error).__name__])[0]
    return WAYS[0], why


def depends(level: str, at: At) -> tuple[list[bool], list[bool]]:
    """Of each leaf of x, and of y, whether the loss depends on it there."""
    x, y = ([leaf.detach().requires_grad_() for leaf in leaves] for leaves in (at.x, at.y))
    out = at.value(x, y)
    if not out.requires_grad:
        return [False] * len(x), [False] * len(y)
    try:
        found = torch.autograd.grad(out, [*x, *y], allow_unused=True)
    except RuntimeError as error:  # an operation without a derivative, or that forbids this way to it
        raise InputError(
            f"the {level} loss has no derivative in torch: {str(error).strip().splitlines()[0]}"
        ) from error
    used = [slope is not None for slope in found]
    return used[: len(x)], used[len(x) :]


def work(at: At) -> float:
    """Floating-point operations of the loss for a row: of products and convolutions, which are nearly all."""
    with _Counting() as counter, torch.no_grad():
        at.value(at.x, at.y)
    return counter.operations / len(jax.tree.leaves(at.batch)[0])
