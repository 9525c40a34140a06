"""Packages that only some callbacks need: extras of this library, imported when such a callback starts."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..errors import InputError


def needed(module: str, extra: str, callback: str) -> ModuleType:
    """A module of a package that is an extra.

    Raises:
        InputError: the package is not installed; the sentence says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:
            raise
        raise InputError(
            f"{callback} needs {package}, which is not installed: pip install 'fedbilevel[{extra}]'."
        ) from None
