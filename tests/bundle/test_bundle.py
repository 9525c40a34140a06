"""What an app consists of beside its file: modules, data files, packages. Shipped, compared, or refused in a sentence."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedbilevel as fb
from fedbilevel.app import load_app

pytest.importorskip("nvflare")
from fedbilevel.engines.faults import Faults
from fedbilevel.engines.nvflare.agreement import check_same, checked_hello
from fedbilevel.engines.nvflare.server import Collab
from fedbilevel.engines.nvflare.worker import Worker, WorkerSaid, _Inside
from helpers.app_of_files import FILES, SHIPPED, write


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """A folder like one of PYTHONPATH."""
    folder = tmp_path / "libraries"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("somelib", "elsewhere", "split", "places"):
            del sys.modules[name]


# Modules of one's own ------------------------------------------------------------------------------------------------------


def test_two_apps_share_no_module(tmp_path, monkeypatch):
    sentinel = object()
    monkeypatch.setitem(sys.modules, "helper", sentinel)  # nor one with the rest of the process
    path = list(sys.path)
    one = load_app(write(tmp_path / "one"))
    other = load_app(write(tmp_path / "other", helper_py=FILES["helper.py"].replace("0.1", "3"), late_py="VALUE = 2\n"))
    own = [app.start.__globals__["helper"] for app in (one, other)]
    assert [module.PENALTY for module in own] == [0.1, 3]
    assert [own[k].later() for k in (0, 1, 0)] == [1, 2, 1]  # also what is imported later
    assert sys.path == path and sys.modules["helper"] is sentinel
    assert not {"late", "models", "loading", "computed"} & set(sys.modules)
    values = [fb.solve(a.problem, a.data(["s1", "s2"]), a.algorithm, *a.begin(), 3, key=a.key).y for a in (one, other)]
    assert np.abs(values[0] - values[1]).max() > 1e-2


def test_what_is_read_anew_is_new(tmp_path):
    """Python's own cache knows a text by its length and the second of its change."""
    write(tmp_path)
    for value in (1, 2, 3):
        (tmp_path / "late.py").write_text(f"VALUE = {value}\n")
        assert load_app(tmp_path / "app.py").start.__globals__["helper"].later() == value


def test_folders_that_an_app_adds_are_its_own(tmp_path):
    found = []
    for value in ("1", "2"):
        folder = tmp_path / value
        (folder / "src").mkdir(parents=True)
        (folder / "src" / "deeper.py").write_text(f"VALUE = {value}\n")
        write(folder, "import sys; sys.path.insert(0, str(HERE / 'src')); import deeper")
        app = load_app(folder / "app.py")
        assert str(app.start.__globals__["deeper"].VALUE) == value
        found.append(app.bundle().files["src/deeper.py"])
    assert found[0] != found[1] and "deeper" not in sys.modules and not [e for e in sys.path if str(tmp_path) in e]


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ("import helper.missing", "No module named 'helper.missing'; 'helper' is not a package"),
        ("import statistics", "statistics.py has the name of a module that is not the app's, statistics: rename it"),
        ("importlib.import_module('models.nothing')", "No module named 'models.nothing'"),
    ],
)
def test_what_cannot_be_imported_is_named_as_in_the_app(tmp_path, extra, sentence):
    (tmp_path / "statistics.py").write_text("")
    with pytest.raises(fb.InputError) as refused:
        load_app(write(tmp_path, extra))
    assert sentence in str(refused.value) and "fedbilevel_app" not in str(refused.value)
    assert not [name for name in sys.modules if name.startswith("fedbilevel_app") and "statistics" in name]


# What is shipped -----------------------------------------------------------------------------------------------------------


def test_a_job_holds_all_that_the_app_needs_and_nothing_else(fedbilevel, tmp_path, monkeypatch):
    file = write(tmp_path / "app")
    assert sorted(load_app(file).bundle().files) == SHIPPED
    code, _, errors = fedbilevel("deploy", file, "--out", tmp_path / "jobs", "--clients", 3)
    assert code == 0, errors
    custom = tmp_path / "jobs" / "parts" / "app" / "custom"
    monkeypatch.syspath_prepend(custom)  # as nvflare does
    assert sorted(p.relative_to(custom).as_posix() for p in custom.rglob("*") if p.is_file()) == SHIPPED
    there = load_app(custom / "app.py")
    x, y = there.begin()
    assert x.tolist() == y.tolist() == [1, 1]
    assert there.bundle().files == load_app(file).bundle().files
    assert there.rows("site-2")[0]["a"].max() == 2


def test_a_folder_of_modules_may_share_its_name_with_an_installed_one(tmp_path, libraries):
    (libraries / "places").mkdir()
    (libraries / "places" / "far.py").write_text("")
    mine = "from places import of_no_package as mine; import places.of_no_package; import places.far as theirs"
    module = load_app(write(tmp_path / "app", mine)).start.__globals__
    assert module["mine"].__name__.startswith("fedbilevel_app")
    assert module["theirs"].__name__ == "places.far"


def test_versions_are_of_what_its_modules_import(tmp_path):
    bundle = load_app(write(tmp_path)).bundle()
    assert bundle.packages["numpy"] == np.__version__ and bundle.packages["jax"]
    assert bundle.packages["not_installed_here"] is None
    assert bundle.packages["fedbilevel"].startswith(fb.__version__)
    assert set(bundle.packages) == {"numpy", "jax", "fedbilevel", "not_installed_here"}
    assert bundle.optional == {}  # numpy is no option, and the driver is not here


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (["none.json"], "'none.json', and there is no such file"),
        (["weights/*.txt"], "'weights/*.txt', and there is no such file"),
        (["weights"], "is a folder"),
        (["/etc/hosts"], "within the app's folder, relative to it; got '/etc/hosts'"),
        (["../site.csv"], "within the app's folder"),
        (["weights/../../x"], "within the app's folder"),
        (["~/x"], "within the app's folder"),
        ("scale.json", "is a list of names"),
        ([3], "is a list of names"),
        ([""], "is a list of names"),
    ],
)
def test_files_that_cannot_be_declared(tmp_path, files, sentence):
    file = write(tmp_path)
    file.write_text(file.read_text().replace('["scale.json", "./weights/*.npy"]', repr(files)))
    with pytest.raises(fb.InputError) as refused:
        load_app(file)
    assert sentence in str(refused.value)


# What is refused -----------------------------------------------------------------------------------------------------------


def distribution(folder: Path, version: str, listed: bool = True) -> Path:
    """A folder with an installed package, somelib; `listed`: whether its record has the module."""
    info = folder / f"somelib-{version}.dist-info"
    info.mkdir(parents=True)
    (folder / "somelib.py").write_text("")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: somelib\nVersion: {version}\n")
    (info / "RECORD").write_text(f"somelib.py,,\nsomelib-{version}.dist-info/METADATA,,\n" if listed else "")
    (info / "top_level.txt").write_text("somelib\n")
    return folder


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ("import elsewhere", "app.py imports elsewhere, which is neither in the app's folder nor part of an installed"),
        ("def late():\n    from elsewhere import thing", "imports elsewhere"),
        ("import split.part", "imports split.part"),
        ("from split import part", "imports split.part"),
        ("import somelib", "imports somelib"),
        ("import __main__", "imports __main__"),
        ("def late():\n    import compiled", "which is compiled code"),
        ("importlib.import_module('else' + 'where')", "imports elsewhere"),
        ("def late():\n    return importlib.import_module('elsewhere')", "imports elsewhere"),
        ("def late():\n    import statistics", "rename it"),
        ("def late():\n    import broken", "broken.py is no Python"),
    ],
)
def test_what_can_be_neither_shipped_nor_compared_is_refused(fedbilevel, tmp_path, libraries, extra, sentence):
    distribution(libraries, "1.0", listed=False)  # as an editable one: its files lie elsewhere
    (libraries / "elsewhere.py").write_text("thing = 1\n")
    (libraries / "split").mkdir()
    (libraries / "split" / "part.py").write_text("")
    file = write(tmp_path / "app", extra)
    for name in ("compiled.so", "statistics.py"):
        (tmp_path / "app" / name).write_text("")
    (tmp_path / "app" / "broken.py").write_text("1 +\n")
    code, _, errors = fedbilevel("deploy", file, "--out", tmp_path / "jobs", "--clients", 3)
    assert code == 2 and sentence in errors and len(errors.splitlines()) == 1
    code, _, errors = fedbilevel("run", file, "--engine", "nvflare", "--out", tmp_path / "out")
    assert code == 2 and sentence in errors
    assert load_app(file).begin()  # a simulation takes it as it is


def test_an_installed_package_is_known_by_its_version(tmp_path, libraries):
    distribution(libraries, "1.2.3")
    (libraries / "elsewhere.py").write_text("")
    app = load_app(write(tmp_path, "import somelib\ndef late():\n    import sklearn.linear_model"))
    assert app.bundle().packages["somelib"] == "1.2.3"
    assert app.bundle().optional == {"scikit-learn": importlib.metadata.version("scikit-learn")}


# What is compared ----------------------------------------------------------------------------------------------------------


def told(file: Path) -> dict:
    """What a site says of itself, as it arrives."""
    rows = json.dumps({"dict": {"a": {"row": [2], "dtype": "float64"}}})
    return json.loads(json.dumps({**load_app(file).bundle().told(), "rows": [rows, rows], "counts": None, "worker": 7}))


def meet(monkeypatch, server: Path, sites: dict[str, dict], folder: Path):
    """Have the server's engine meet sites that say this."""
    engine = Collab(sorted(sites), Faults(), folder / "rounds.csv", False, None)
    monkeypatch.setattr(engine, "_all", lambda call: call(Asked(sites)))
    try:
        return engine.meet(load_app(server).with_(check=False))  # these sites have no rows
    finally:
        engine.ledger.close()


class Asked:
    def __init__(self, sites):
        self.sites = sites

    def hello(self):
        return self.sites

    def prepare(self, setup):
        return setup


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"helper_py": FILES["helper.py"].replace("0.1", "100")}, "it has another helper.py"),
        ({"models_parts_bits_py": "BIT = 2\n"}, "it has another models/parts/bits.py"),
        ({"late_py": "VALUE = 3\n"}, "it has another late.py"),
        ({"loading_py": FILES["loading.py"] + "# mine\n"}, "it has another loading.py"),
        ({"computed_py": "VALUE = 6\n"}, "it has another computed.py"),
        ({"scale_json": '{"scale": 2.0}'}, "it has another scale.json"),
        ({"extra": "import site_only"}, "it has another app.py; only it has site_only.py"),
    ],
)
def test_sites_that_differ_are_named_with_the_file(monkeypatch, tmp_path, changes, sentence):
    mine = write(tmp_path / "server")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "site_only.py").write_text("")
    theirs = write(tmp_path / "theirs", **changes)
    assert meet(monkeypatch, mine, {"site-1": told(mine), "site-2": told(mine)}, tmp_path) is None
    with pytest.raises(fb.InputError) as refused:
        meet(monkeypatch, mine, {"site-1": told(mine), "site-2": told(theirs)}, tmp_path)
    assert f"site site-2 does not run the server's app: {sentence}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_other_versions_and_missing_things_are_named(tmp_path):
    mine = load_app(write(tmp_path)).bundle()
    alike = mine.told()

    def sentence(part, **changes):
        values = {name: value for name, value in {**alike[part], **changes}.items() if value != "gone"}
        with pytest.raises(fb.InputError) as refused:
            check_same("north", {**alike, part: values}, mine)
        return str(refused.value)

    check_same("north", alike, mine)
    check_same("north", {**alike, "optional": {"oracledb": "2.0"}}, mine)
    assert (
        f"site north has other packages than the server: numpy 1.0, where the server has {np.__version__}"
        in sentence("packages", numpy="1.0")
    )
    assert "it lacks jax" in sentence("packages", jax="gone")
    assert "only it has not_installed_here 3" in sentence("packages", not_installed_here="3")
    assert "it lacks late.py" in sentence("files", **{"late.py": "gone"})
    assert "only it has more.py" in sentence("files", **{"more.py": "0" * 64})
    loaded_by_name = {**alike["files"], "site.csv": mine.sha("site.csv")}  # there, alike, and not known to be used
    check_same("north", {**alike, "files": loaded_by_name}, mine)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=3), inside, max_size=3),
    max_leaves=5,
)
PROPER = {
    "files": {"app.py": "0"},
    "packages": {"a": None},
    "optional": {},
    "rows": ["a", "b"],
    "counts": None,
    "worker": 1,
}


@given(st.sampled_from(sorted(PROPER)), anything)
def test_what_a_site_says_is_read_or_refused(name, value):
    assert checked_hello("a", PROPER, False) is PROPER
    with contextlib.suppress(fb.RunError):
        said = checked_hello("a", {**PROPER, name: value}, False)
        assert all(isinstance(text, str) for text in (*said["files"].values(), *said["rows"]))


@pytest.mark.parametrize("file", ["../app.py", "/etc/passwd", "a/../../b", ""])
def test_a_site_cannot_ask_for_files_outside(file):
    with pytest.raises(fb.RunError, match="cannot be read"):
        checked_hello("a", {**PROPER, "files": {file: "0"}}, False)


@pytest.mark.parametrize("rows", ["np.zeros((0, 2))", "np.full((2, 2), np.nan)"])
def test_rows_that_cannot_be_used_are_refused_when_they_are_loaded(tmp_path, rows):
    """Not by the server, for which a site without rows has no weight."""
    text = FILES["loading.py"].replace("np.full((3, 2), float(site[-1]))", rows)
    inside = _Inside(str(write(tmp_path, loading_py=text)), "north", tmp_path / "state")
    with pytest.raises(fb.InputError, match="north"):
        inside.do("load", b"", {})


@pytest.mark.slow
def test_a_site_s_worker_says_of_what_its_app_consists(tmp_path, monkeypatch):
    file = write(tmp_path / "app")
    worker = Worker(str(file), "site-2", str(tmp_path / "state"))
    try:
        said = worker.ask("load")[0]
    finally:
        worker.end()
    mine = load_app(file).bundle()
    assert {name: said[name] for name in ("files", "packages", "optional")} == mine.told()
    check_same("site-2", checked_hello("site-2", {**said, "worker": 1}, False), mine)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "driver_of_one_site.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    worker = Worker(str(file), "site-2", str(tmp_path / "state"))
    try:
        with pytest.raises(WorkerSaid, match=r"loading\.py imports driver_of_one_site, which is neither"):
            worker.ask("load")
    finally:
        worker.end()
