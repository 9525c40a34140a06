"""What is in the library's wheel: its modules and what they read, and no study."""

import subprocess
import sys
import zipfile
from pathlib import PurePath

import pytest

from helpers.places import ROOT

SOURCE = ROOT / "src" / "fedbilevel"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of the wheel, by their paths in it; built by the very backend, without an environment of its own."""
    out = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(out)!r}))"
    built = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return zipfile.ZipFile(next(out.glob("*.whl"))).namelist()


def test_its_folders_are_the_library_s(files):
    packages = {str(file.parent.relative_to(SOURCE.parent)) for file in SOURCE.rglob("__init__.py")}
    found = {str(PurePath(file).parent) for file in files if ".dist-info" not in file}
    assert found == packages
    assert {folder.partition("/")[0] for folder in found} == {"fedbilevel"}


def test_no_study_is_in_it(files):
    assert not [file for file in files if "stud" in file or "experiments" in file or "theory" in file]


def test_it_has_every_module_and_what_they_read(files):
    modules = {str(file.relative_to(SOURCE.parent)) for file in SOURCE.rglob("*.py")}
    data = {file for file in files if not file.endswith(".py") and ".dist-info" not in file}
    assert {file for file in files if file.endswith(".py")} == modules
    assert data == {"fedbilevel/settings.toml"}
