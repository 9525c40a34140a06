"""Folders that tests look into."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
EXAMPLES = ROOT / "examples"
DATA = ROOT.parent / "shared" / "data"  # the data sets that are not shipped, where they are there
