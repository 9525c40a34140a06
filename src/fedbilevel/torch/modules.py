"""A module's parameters as x or y, and the module as a function of them."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..errors import InputError, check

_WITHIN = ("_orig_mod", "module", "_module")  # where torch.compile, DataParallel and its kin, and opacus keep it
_WRAPPERS = ("OptimizedModule", "DataParallel", "DistributedDataParallel", "GradSampleModule")


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trainable parameters of a module by name, copies: what x or y may be, and `load_state_dict` takes.

    Frozen ones (`requires_grad=False`) and buffers stay with the module; a weight that is tied is there once.

    Raises:
        InputError: it is no module, or has none.
    """
    module = unwrapped(module)
    found = {name: one.detach().clone() for name, one in module.named_parameters() if one.requires_grad}
    check(found, f"{type(module).__name__} has no trainable parameters: x and y are made of those.")
    for name, one in module.named_parameters():
        check(
            not torch.nn.parameter.is_lazy(one),
            f"{name} of {type(module).__name__} is not there yet: run the module once on some rows.",
        )
    return found


class Model:
    """A module as a function of its parameters: `model(y, inputs)`.

    It holds a copy of the module as it is when it is made, with its frozen parameters and its buffers, so that whatever
    happens to the module later changes nothing here. What wraps it (DataParallel, torch.compile, opacus) is taken off.

    Args:
        module: in the mode in which it is to run: `module.eval()` switches dropout off and has BatchNorm use the
            statistics that it has.

    Attributes:
        module: the copy.

    Raises:
        InputError: it is no module.
    """

    def __init__(self, module: torch.nn.Module):
        self.module = copy.deepcopy(unwrapped(module))

    def __call__(self, parameters: dict[str, torch.Tensor], *inputs: Any, **named: Any) -> Any:
        """What the module gives for some inputs with these parameters in place of its own."""
        return torch.func.functional_call(self.module, parameters, inputs, named)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Those of the module (`fedbilevel.torch.parameters`): where a run may start."""
        return parameters(self.module)


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """A module without what wraps it."""
    check(isinstance(module, torch.nn.Module), f"a torch.nn.Module is wanted; got {module!r}.")
    while type(module).__name__ in _WRAPPERS:
        name = next((name for name in _WITHIN if name in module._modules), None)
        if name is None:
            raise InputError(f"{type(module).__name__} wraps a module that is not found in it: pass the module itself.")
        plain = getattr(module, "to_standard_module", None)  # opacus: without its hooks
        module = plain() if plain is not None else module._modules[name]  # pyright: ignore[reportAssignmentType]
    return module
