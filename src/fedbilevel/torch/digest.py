"""What losses in torch compute, in a digest: their text and all that they have hold of.

Of a module that is its class, its settings, its buffers and its frozen parameters by their numbers. Trainable parameters
count by name and shape alone: a loss takes them from x or y (`look` refuses one that does not), and the module's own
numbers are nobody's.
"""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import torch

from ..canonical import Writer
from .derivatives import Loss
from .tensors import numbers

_LIBRARY, _OURS = str(Path(torch.__file__).parent), str(Path(__file__).parent.parent)


class _TorchWriter(Writer):
    libraries = (*Writer.libraries, _LIBRARY)

    def _value(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self.word("tensor", value.dtype)
            self.array(numbers(value))
        elif isinstance(value, torch.nn.Module):
            self.module(value)
        else:
            if _computes(value):
                self.methods(type(value))
            super()._value(value)

    def counts(self, value: Any) -> bool:
        return super().counts(value) or isinstance(value, (torch.Tensor, torch.nn.Module)) or _computes(value)

    def methods(self, kind: type) -> None:
        """The text of a class, but for what libraries and this package have written."""
        for each in kind.__mro__:
            functions = {name: part for name, part in vars(each).items() if hasattr(part, "__code__")}
            known = (*self.libraries, _OURS)
            self.value({n: f for n, f in functions.items() if not f.__code__.co_filename.startswith(known)})

    def module(self, module: torch.nn.Module) -> None:
        kind = type(module)
        self.word("module", kind.__module__, kind.__qualname__, module.training)
        self.methods(kind)
        for name, parameter in module.named_parameters(recurse=False):
            self.word(name, tuple(parameter.shape), parameter.dtype, parameter.requires_grad)
            if not parameter.requires_grad:
                self.array(numbers(parameter))
        self.value(dict(module.named_buffers(recurse=False)))
        self.value({name: part for name, part in vars(module).items() if not name.startswith("_")})
        for name, child in module.named_children():
            self.word(name)
            self.value(child)


def _computes(value: Any) -> bool:
    """Whether it is an object that a loss may call, such as a `Model`, or a user's record of numbers."""
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)):
        return False
    ours = type(value).__module__.partition(".")[0] == __name__.partition(".")[0]
    record = dataclasses.is_dataclass(value) or isinstance(value, types.SimpleNamespace)
    return callable(value) or (record and not ours)


def digest(*losses: Loss) -> str:
    """Of losses: equal in every process for those of the same text that hold the same."""
    writer = _TorchWriter()
    writer.value(losses)
    return writer.digest()
