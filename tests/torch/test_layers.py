"""The page's table of second derivatives is that of the installed PyTorch."""

from __future__ import annotations

import warnings

import pytest
import torch

from fedbilevel.torch.layers import table
from helpers.places import ROOT


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="the page shows what 2.13 does")
def test_the_table_of_the_page():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(table())
    page = (ROOT / "docs" / "pytorch.md").read_text().splitlines()
    assert [line.split(" (")[0] for line in found[:1]] == ["| layer"]
    assert found[1:] == [line for line in page[page.index(found[1]) :] if line.startswith("|")][: len(found) - 1]
