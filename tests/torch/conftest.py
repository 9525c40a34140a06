"""These tests need PyTorch (`make test-torch` installs it), and are skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.torch)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        return True if collection_path.name.startswith("test_") else None
    return None
