"""Tests lie as the modules do: folders are the library's, files are named after its modules, or after a property."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from helpers.places import ROOT, TESTS


@dataclasses.dataclass(frozen=True)
class Tree:
    """A project's tests, its modules, and by folder what is no module's own."""

    tests: Path
    source: Path
    properties: dict[str, str]

    def room(self, file):
        return str(file.parent.relative_to(self.tests))

    def names(self, folder):
        """What a test file of a folder may be named after: its modules, and the folder itself."""
        within = self.source / folder
        return {path.stem for path in within.iterdir()} | {within.name} - {"__init__"}

    def named(self, file):
        stem = file.stem.removeprefix("test_")
        own = any(stem == name or stem.startswith(f"{name}_") for name in self.names(self.room(file)))
        return own or stem in self.properties.get(self.room(file), "").split()


LIBRARY = Tree(
    TESTS,
    ROOT / "src" / "fedbilevel",
    {
        ".": "additions benchmarks checks complex design docs examples facts float32 input layout messages mnist on_disk"
        " recorded typing wheel",
        "algorithms": "bias estimator family_messages family_methods family fields properties second_moment whole",
        "diagnosis": "divergence",
        "engines": "dropout_weights same_cohort several",
        "protocol": "nested",
        "tasks": "saddle_and_composition",
        "torch": "network",
    },
)
STUDIES = Tree(ROOT / "studies" / "tests", ROOT / "studies" / "src" / "fedbilevel_studies", {".": "public_names store"})
TREES = pytest.mark.parametrize("tree", [LIBRARY, STUDIES], ids=["library", "studies"])


@TREES
def test_every_file_is_named_after_a_module_or_a_known_property(tree):
    files = list(tree.tests.rglob("test_*.py"))
    assert files
    for file in files:
        assert (tree.source / tree.room(file)).is_dir(), f"{file}: there is no such folder of modules"
    strange = [str(file) for file in files if not tree.named(file)]
    assert not strange, f"{strange}: after neither a module nor a property of the table above"


@TREES
def test_every_property_has_its_file(tree):
    for folder, stems in tree.properties.items():
        for stem in stems.split():
            assert (tree.tests / folder / f"test_{stem}.py").exists(), (folder, stem)
            assert stem not in tree.names(folder)


def test_what_tests_share_is_in_one_package():
    every = [file for tree in (LIBRARY, STUDIES) for file in tree.tests.rglob("*.py")]
    others = {file for file in every if not file.name.startswith("test_") and file.name != "conftest.py"}
    assert {file.parent for file in others} == {TESTS / "helpers"}
    shared = [line for file in every for line in file.read_text().splitlines() if "import" in line]
    assert not [line for line in shared if line.startswith(("from test_", "import test_", "from conftest"))]
