"""What the documentation shows runs: the Python blocks of each page in order, and the fedbilevel commands.

A block after `<!-- long -->` is left out; a line `--8<-- "file"` stands for that file, as it does on the page.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.places import ROOT

SOURCE = ROOT / "src" / "fedbilevel"
PAGES = [*ROOT.glob("README.md"), *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"(?P<long><!-- long -->\s*)?^```(?P<language>python|bash)\n(?P<text>.*?)^```$", re.M | re.S)
INCLUDED = re.compile(r'^--8<-- "(.+)"$', re.M)


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    """(line, text) of the blocks of a page that are to be run."""
    found = [match for match in BLOCK.finditer(page) if match["language"] == language and not match["long"]]
    return [(page.count("\n", 0, match.start("text")) + 1, match["text"]) for match in found]


def script(page: str) -> str:
    """The page's Python as one file in which every statement stands on its own line of the page."""
    lines: list[str] = []
    for line, text in blocks(page, "python"):
        included = INCLUDED.sub(lambda match: f"exec({(ROOT / match[1]).read_text()!r})", text)
        lines += [""] * (line - 1 - len(lines)) + included.splitlines()
    return "\n".join(lines)


def commands(page: str) -> list[list[str]]:
    """The fedbilevel commands of the page, as lists of words."""
    joined = [text.replace("\\\n", " ") for _, text in blocks(page, "bash")]
    words = [shlex.split(line, comments=True) for text in joined for line in text.splitlines()]
    return [line[1:] for line in words if line[:1] == ["fedbilevel"]]


SERVER = """
import json, os, runpy, sys, traceback
import matplotlib.figure, pandas
import fedbilevel.cli
from fedbilevel import *

def run(job):
    if isinstance(job, str):
        runpy.run_path(job, run_name="__main__")
        return
    for words in job:
        sys.argv = ["fedbilevel", *words]
        try:
            fedbilevel.cli.main()
        except SystemExit as end:
            assert not end.code, f"{words} ended with {end.code}"

for line in sys.stdin:
    job, folder, log = json.loads(line)
    child = os.fork()
    if not child:
        code = 1
        try:
            os.chdir(folder)
            for stream in (1, 2):
                os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
            run(job)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Fresh:
    """Processes in which the library is imported and nothing else has happened: forked, for imports take two seconds."""

    def __init__(self):
        command = [sys.executable, "-W", "ignore:.*os.fork:RuntimeWarning", "-c", SERVER]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, job: str | list[list[str]], cwd: Path) -> None:
        """A Python file, or commands one after the other, in a folder."""
        log = cwd / "printed.txt"
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps([job, str(cwd), str(log)]) + "\n")
        self._server.stdin.flush()
        code = self._server.stdout.readline().strip()
        assert code == "0", f"{job} ended with {code}\n{log.read_text()}"

    def end(self) -> None:
        self._server.communicate()


@pytest.fixture(scope="module")
def fresh():
    process = Fresh()
    yield process
    process.end()


def speed(page: Path) -> list[pytest.MarkDecorator]:
    """The pages of the API are many, networks compile for long: slow tests. Those of models in PyTorch need it."""
    slow = "api" in page.relative_to(ROOT).parts or page.stem == "equinox-and-flax"
    return [pytest.mark.slow] * slow + [pytest.mark.torch] * ("\nimport torch\n" in page.read_text())


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=speed(page)) for page in PAGES if script(page.read_text()).strip()],
    ids=lambda page: page.stem,
)
def test_the_python_of_a_page_runs(page, fresh, tmp_path):
    file = tmp_path / f"{page.stem}.py"
    file.write_text(script(page.read_text()))
    fresh.run(str(file), tmp_path)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/quickstart.md"])
def test_a_first_example_gives_no_step_size(page):
    parts = [text for _, text in blocks((ROOT / page).read_text(), "python")]
    solved = next(k for k, text in enumerate(parts) if "fb.solve(" in text)
    assert "_lr" not in "".join(parts[: solved + 1])


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.stem == "cost" else [])
        for page in PAGES
        if commands(page.read_text())
    ],
    ids=lambda page: page.stem,
)
def test_the_commands_of_a_page_run(page, fresh, tmp_path):
    fresh.run(commands(page.read_text()), tmp_path)


PAGE = """# A page
```python
a = 1
```
<!-- long -->
```python
raise SystemExit("left out")
```
```py
raise SystemExit("shown only")
```
```python
assert a == 2
```
```bash
make demo
fedbilevel run quadratic \\
  --rounds 13  # a comment
```
<!-- long -->
```bash
fedbilevel compare
```
"""


def public_names() -> set[str]:
    """What `import fedbilevel as fb` offers."""
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    shipped = [importlib.import_module(f"fedbilevel.{node.module}") for node in imports if node.names[0].name == "*"]
    all_of = {name for module in shipped for name, kind in vars(module).items() if isinstance(kind, type)}
    imported = [alias for node in imports for alias in node.names]
    return all_of | {alias.name for alias in imported if not (alias.asname or alias.name).startswith(("_", "*"))}


def test_every_public_name_has_a_page_with_an_example():
    pages = sorted((ROOT / "docs" / "api").glob("**/*.md"))
    used = {name for page in pages for name in re.findall(r"\bfb\.(\w+)", script(page.read_text()))}
    # what comes through another name: a task's engine, the module of algorithms
    assert public_names() - used - {"algorithms", "engines"} == set()
    table = (ROOT / "docs" / "api" / "index.md").read_text()
    assert {name for name in public_names() if f"`{name}`" not in table} <= {
        "algorithms", "engines", "ClientError", "Diverged", "InputError", "RunError",
    }  # fmt: skip


def test_from_tables_to_tuned_settings_in_25_lines_without_a_step_size():
    page = (ROOT / "docs" / "tune.md").read_text()
    (own,) = [text for _, text in blocks(page, "python") if "print(result.x)" in text]
    assert len([line for line in own.splitlines() if line.strip()]) <= 25
    assert "_lr=" not in page


def test_a_wrong_page_fails_at_its_own_line(fresh, tmp_path):
    file = tmp_path / "page.py"
    file.write_text(script(PAGE))
    with pytest.raises(AssertionError, match=r'page.py", line 13(.|\n)*AssertionError'):
        fresh.run(str(file), tmp_path)
    file.write_text(script(PAGE.replace("a == 2", "a == 1")))
    fresh.run(str(file), tmp_path)


def test_commands_are_found(fresh, tmp_path):
    assert commands(PAGE) == [["run", "quadratic", "--rounds", "13"]]
    with pytest.raises(AssertionError, match="ended with 2"):
        fresh.run([["list"], ["lst"]], tmp_path)


def test_tables_on_the_pages_are_those_that_studies_left(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import refresh

    found = [table for page in PAGES for table in refresh.TABLE.findall(page.read_text())]
    assert found
    for page in PAGES:
        assert refresh.rewrite(page.read_text()) == page.read_text(), f"{page.name}: run docs/refresh.py"
    study, table = found[0][1:3]
    assert refresh.kept(study, table) not in refresh.rewrite(f"<!-- {study}/{table} -->\nnothing\n<!-- out -->")
    assert refresh.kept(study, table) in refresh.rewrite(f"<!-- {study}/{table} -->\nold\n<!-- end -->")
