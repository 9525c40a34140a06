"""Tests lie as the modules do: folders are the library's, files are named after its modules, or after a property."""

from __future__ import annotations

from helpers.places import ROOT, TESTS

SOURCE = ROOT / "src" / "fedbilevel"
PROPERTIES = {  # what is no module's own, by folder
    ".": "additions checks complex design docs examples facts float32 input layout messages mnist on_disk recorded typing",
    "algorithms": "bias estimator family_messages family_methods family fields properties second_moment whole",
    "diagnosis": "divergence",
    "engines": "dropout_weights same_cohort",
    "protocol": "nested",
    "tasks": "saddle_and_composition",
}


def room(file):
    return str(file.parent.relative_to(TESTS))


def named(file):
    stem = file.stem.removeprefix("test_")
    own = any(stem == name or stem.startswith(f"{name}_") for name in names(room(file)))
    return own or stem in PROPERTIES.get(room(file), "").split()


def names(folder):
    """What a test file of a folder may be named after: its modules, and the folder itself."""
    within = SOURCE / folder
    return {path.stem for path in within.iterdir()} | {within.name} - {"__init__"}


def test_every_file_is_named_after_a_module_or_a_known_property():
    for file in TESTS.rglob("test_*.py"):
        assert (SOURCE / room(file)).is_dir(), f"{file}: the library has no such folder"
    strange = [str(file) for file in TESTS.rglob("test_*.py") if not named(file)]
    assert not strange, f"{strange}: after neither a module nor a property of the table above"


def test_every_property_has_its_file():
    for folder, stems in PROPERTIES.items():
        for stem in stems.split():
            assert (TESTS / folder / f"test_{stem}.py").exists(), (folder, stem)
            assert stem not in names(folder)


def test_what_tests_share_is_in_one_package():
    others = {file for file in TESTS.rglob("*.py") if not file.name.startswith("test_") and file.name != "conftest.py"}
    assert {file.parent for file in others} == {TESTS / "helpers"}
    shared = [line for file in TESTS.rglob("*.py") for line in file.read_text().splitlines() if "import" in line]
    assert not [line for line in shared if line.startswith(("from test_", "import test_", "from conftest"))]
