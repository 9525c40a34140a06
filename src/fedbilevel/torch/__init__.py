"""PyTorch models, as they are: `fedbilevel.torch.Problem`, whose losses take tensors, wherever a problem is taken.

It needs PyTorch, `pip install "fedbilevel[torch]"`; nothing else in the library imports it.
"""

try:
    import torch as _torch
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'fedbilevel.torch needs PyTorch: pip install "fedbilevel[torch]".', name=error.name
    ) from error

from ..foreign import make_known as _make_known
from .modules import Model, parameters
from .problem import Problem
from .tensors import Tensors as _Tensors

_make_known(_Tensors())

__all__ = ["Model", "Problem", "parameters"]
