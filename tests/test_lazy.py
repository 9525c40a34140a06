"""`import fedbilevel` loads next to nothing; what it offers is there when it is asked for, and is what it was."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys

import pytest

import fedbilevel as fb
from fedbilevel.lazy import offered
from helpers.places import ROOT

SOURCE = ROOT / "src" / "fedbilevel" / "__init__.py"
HEAVY = {
    "matplotlib", "pandas", "sklearn", "rich", "typer",
    "tensorboardX", "wandb", "torch", "nvflare", "optimistix", "lineax",
}  # fmt: skip
OFFERED = offered("fedbilevel", SOURCE)


def fresh(code: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(code: str) -> set[str]:
    return set(json.loads(fresh(f"{code}\nimport json, sys; print(json.dumps(list(sys.modules)))")))


def test_import_loads_next_to_nothing():
    modules = loaded_by("import fedbilevel")
    assert modules & (HEAVY | {"jax", "numpy", "equinox", "optax"}) == set()
    own = {name for name in modules if name.startswith("fedbilevel")}
    assert own == {f"fedbilevel{end}" for end in ("", ".errors", ".lazy", ".moved", ".version")}


def test_a_run_needs_nothing_heavy():
    modules = loaded_by(
        "import fedbilevel as fb\n"
        "fb.solve, fb.AggITD, fb.Problem, fb.FederatedData, fb.Simulation, fb.estimator\n"
        "fb.tasks.quadratic, fb.callbacks.CSV"
    )
    assert {"jax", "fedbilevel.solve"} <= modules
    assert modules & HEAVY == set()


def test_everything_offered_is_there_under_its_name():
    for name, (module, own) in OFFERED.items():
        held = importlib.import_module(module)
        assert getattr(fb, name) is (held if own is None else getattr(held, own)), name
    assert {"solve", "AggITD", "Simulation", "reference", "protocol", "Problem"} <= set(OFFERED)
    assert set(OFFERED) | {"InputError", "__version__"} <= set(dir(fb))
    assert set(OFFERED) < set(fb.__all__)


def test_all_of_it_can_be_taken_at_once():
    said = fresh(
        "from fedbilevel import *\nprint(solve.__name__, AggITD.__name__, InputError.__name__, tasks.__name__)"
    )
    assert said.split() == ["solve", "AggITD", "InputError", "fedbilevel.tasks"]


@pytest.mark.slow
def test_a_function_is_not_replaced_by_the_module_of_its_name():
    said = fresh(
        "import fedbilevel.solve, fedbilevel.protocol.table\n"
        "from fedbilevel.estimator import Estimator\n"
        "import fedbilevel as fb\n"
        "print(type(fb.solve).__name__, type(fb.protocol).__name__, type(fb.estimator).__name__)\n"
        "print(fb.variables.__name__)"
    )
    assert said.split() == ["function"] * 3 + ["fedbilevel.variables"]


@pytest.mark.slow
def test_paths_of_before_are_found_before_anything_else_is():
    said = fresh(
        "import warnings; warnings.simplefilter('ignore')\n"
        "import fedbilevel as fb\n"
        "print(fb.engines.transport.__name__, fb.exchanges.__name__)\n"
        "from fedbilevel.algorithms.fedbio import FedBiOAcc\n"
        "print(FedBiOAcc.__module__)"
    )
    places = "engines.messaging.transport", "protocol.table", "algorithms.fedbioacc"
    assert said.split() == [f"fedbilevel.{place}" for place in places]


def test_what_is_not_there_is_missed():
    with pytest.raises(AttributeError, match="module 'fedbilevel' has no attribute 'nowhere'"):
        _ = fb.nowhere
    with pytest.raises(ImportError, match="cannot import name 'nowhere'"):
        from fedbilevel import nowhere  # noqa: F401
    assert not hasattr(fb, "_nowhere")


def test_only_imports_below_the_line_are_offered(tmp_path):
    (tmp_path / "kinds").mkdir()
    (tmp_path / "kinds" / "shipped.py").write_text("from .one import One as One\nfrom .two import two as second\n")
    file = tmp_path / "__init__.py"
    file.write_text(
        "from .plain import thing\nif TYPE_CHECKING:\n    import os\n    from json import loads\n    from . import sub\n"
        "    from .kinds.shipped import *\nelse:\n    from .never import other\n"
    )
    assert offered("own", file) == {
        "sub": ("own.sub", None), "One": ("own.kinds.one", "One"), "second": ("own.kinds.two", "two"),
    }  # fmt: skip
    assert inspect.getsource(fb).count("if TYPE_CHECKING:") == 1


def test_torch_is_imported_in_its_room_alone():
    """The library does without it; the room says what to install where it is not there."""
    source = ROOT / "src" / "fedbilevel"
    files = [file for file in source.rglob("*.py") if "torch" not in file.relative_to(source).parts]
    importing = re.compile(r"^\s*(import torch\b|from torch\b)", re.M)
    assert len(files) > 200 and not [file for file in files if importing.search(file.read_text())]
    lacking = (
        "import sys; sys.modules['torch'] = None; import fedbilevel.solve, fedbilevel.app; import fedbilevel.torch"
    )
    done = subprocess.run([sys.executable, "-c", lacking], capture_output=True, text=True, timeout=120)
    assert 'fedbilevel.torch needs PyTorch: pip install "fedbilevel[torch]".' in done.stderr.splitlines()[-1]
