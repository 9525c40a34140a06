"""Algorithms whose steps are numbers, for tests that are not about how steps are found."""

from __future__ import annotations

from typing import Any

import fedbilevel as fb

RATES = {"inner_lr": 0.01, "hessian_lr": 0.01, "outer_lr": 0.05}


def plain(kind: type[fb.Algorithm], **settings: Any) -> Any:
    """An algorithm with these settings, and with `RATES` for the steps that it has and that are not among them."""
    rates = {name: value for name, value in RATES.items() if name in kind.__dataclass_fields__}
    return kind(**rates | settings)
