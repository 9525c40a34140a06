"""Tables and lists made of what the library's classes say of themselves, where a page has `<!-- facts/NAME -->`.

What stands up to `<!-- end -->` is made anew for every page that mkdocs builds; `python docs/refresh.py` puts it into the
files. An algorithm without a page of its own gets one here, so that adding one touches no page.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "src"))  # the pages are about the tree that they stand in

from fedbilevel import callbacks, engines  # noqa: E402
from fedbilevel.algorithm import Algorithm  # noqa: E402
from fedbilevel.algorithms import ALGORITHMS  # noqa: E402
from fedbilevel.algorithms.about import about, summary  # noqa: E402
from fedbilevel.datasets import DATASETS  # noqa: E402
from fedbilevel.means.carried import why_not  # noqa: E402
from fedbilevel.results import pipe_table  # noqa: E402
from fedbilevel.settings import STEPS  # noqa: E402
from fedbilevel.tasks import TASKS  # noqa: E402

REGION = re.compile(r"(?P<start><!-- facts/(?P<name>[\w-]+) -->)(?P<line>\n?).*?(?P<end><!-- end -->)", re.S)
REFERENCE = re.compile(r"^::: (?P<module>fedbilevel\.algorithms\.\w+)$", re.M)


def rewrite(text: str) -> str:
    """A page with its facts as they are now; a region that begins within a line is a list, and stays in that line."""

    def made(match: re.Match[str]) -> str:
        told = MADE[match["name"]]()
        return match["start"] + (f"\n\n{told}\n\n" if match["line"] else told) + match["end"]

    return REGION.sub(made, text)


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    return pipe_table(list(head), [list(line) for line in lines]).rstrip()


def listed(names: Iterable[str]) -> str:
    """Names of code, one after the other."""
    return ", ".join(f"`{name}`" for name in names)


# Algorithms --------------------------------------------------------------------------------------------------------------


def pages() -> dict[str, Path]:
    """The pages that are written by hand, by the modules that they are about."""
    found = sorted((DOCS / "api" / "algorithms").glob("*.md"))
    return {module: page for page in found for module in REFERENCE.findall(page.read_text())}


def page_of(kind: type[Algorithm], written: dict[str, Path]) -> str:
    """An algorithm's page, as a path within docs/."""
    page = written.get(kind.__module__)
    return f"api/algorithms/{kind.about.name}.md" if page is None else page.relative_to(DOCS).as_posix()


def made_page(kind: type[Algorithm]) -> str:
    """A page for an algorithm that has none: what it is, a run of it, its reference."""
    name = kind.__name__
    return f"""# {name}

{summary(kind)} [When to use it](../../choose-an-algorithm.md).

```python
import fedbilevel as fb

task = fb.tasks.quadratic(clients=8)
result = fb.solve(task.problem, task.data, fb.{name}(), task.x, task.y, 3, key=task.key)
print(result.protocol)
```

## Reference

::: {kind.__module__}
"""


def algorithms() -> str:
    """The table of all of them, each with its page."""
    written = pages()
    names = {name: f"[`{kind.__name__}`]({page_of(kind, written)})" for name, kind in ALGORITHMS.items()}
    return _facts((name, names[name]) for name in ALGORITHMS)


def of_module(module: str) -> str:
    """The table of those in a module."""
    here = [(name, f"`{kind.__name__}`") for name, kind in ALGORITHMS.items() if kind.__module__ == module]
    return _facts(here) if here else ""


def _facts(named: Iterable[tuple[str, str]]) -> str:
    lines = []
    for name, shown in named:
        told, said = about(name), ALGORITHMS[name].about
        keeps, asks = "yes" if told.state else "no", "ALL clients once" if told.asks == "all" else "cohorts"
        lines.append(
            [shown, f"`{name}`", told.rounds, said.hypergradient, said.lower, told.order, keeps, asks, told.when]
        )
    head = [
        "algorithm",
        "in commands",
        "rounds",
        "hypergradient",
        "lower level",
        "derivatives",
        "state at clients",
        "asks",
    ]
    return table([*head, "when to use it"], lines)


def algorithm_pages() -> str:
    """The table of pages, with the names on each, as seen from docs/api."""
    written, names = pages(), {}
    for kind in ALGORITHMS.values():
        names.setdefault(page_of(kind, written), []).append(kind.__name__)

    def link(page: str) -> str:
        file = DOCS / page
        title = file.read_text().partition("\n")[0].removeprefix("# ") if file.exists() else names[page][0]
        return f"[{title}]({page.removeprefix('api/')})"

    return table(["page", "names"], ([link(page), listed(names[page])] for page in names))


def steps() -> str:
    """Which steps of which algorithm are found while it runs, and why others are not."""
    return table(
        ["algorithm", *(f"`{name}`" for name in STEPS)],
        ([f"`{kind.__name__}`", *_steps(kind)] for kind in ALGORITHMS.values()),
    )


def of_means() -> str:
    """Which algorithms can have an outer loss of means, and why others cannot."""
    lines = ([f"`{kind.__name__}`", why_not(kind) or "yes"] for kind in ALGORITHMS.values())
    return table(["algorithm", "outer loss of means"], lines)


def _steps(kind: type[Algorithm]) -> list[str]:
    fields = {field.name: field for field in dataclasses.fields(kind)}

    def told(field: dataclasses.Field) -> str:
        if "auto" not in field.metadata.get("words", ()):
            return field.metadata["why"]
        return "auto" if field.default == "auto" else 'where you say "auto", in rounds of its own'

    return [told(fields[name]) if name in fields else "it has none" for name in STEPS]


def blocks() -> str:
    """Which algorithms take leaves that belong to clients, and why others do not."""
    told = lambda kind: kind.about.no_blocks or "yes"
    return table(
        ["algorithm", "leaves per client"], ([f"`{kind.__name__}`", told(kind)] for kind in ALGORITHMS.values())
    )


# Everything else ---------------------------------------------------------------------------------------------------------


def _shipped(package: Any, base: type) -> list[type]:
    return [kind for kind in vars(package.shipped).values() if isinstance(kind, type) and issubclass(kind, base)]


def _references(package: Any, base: type) -> str:
    return "\n".join(f"::: {kind.__module__}.{kind.__name__}" for kind in _shipped(package, base))


def _tasks() -> str:
    lines = ([f"`{kind.name}`", kind.summary, listed(kind.datasets)] for kind in TASKS.values())
    return table(["task", "what it is", "data sets"], lines)


def _datasets() -> str:
    lines = ([f"`{name}`", source.summary, str(source.facts.clients)] for name, source in DATASETS.items())
    return table(["data set", "what it is", "clients, unless you say"], lines)


def _engines() -> str:
    lines = ([f"`{kind.__name__}`", summary(kind), kind.use] for kind in engines.ENGINES.values())
    return table(["engine", "what it does", "what for"], lines)


MADE: dict[str, Callable[[], str]] = {
    "algorithms": algorithms,
    "algorithm-names": lambda: listed(kind.__name__ for kind in ALGORITHMS.values()),
    "algorithm-pages": algorithm_pages,
    "steps": steps,
    "means": of_means,
    "blocks": blocks,
    "tasks": _tasks,
    "task-names": lambda: ", ".join(TASKS),
    "datasets": _datasets,
    "engines": _engines,
    "engine-references": lambda: _references(engines, engines.Engine),
    "callback-references": lambda: _references(callbacks, callbacks.Callback),
}


# What mkdocs calls -------------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each algorithm that has none."""
    from mkdocs.structure.files import File

    written = pages()
    navigation = next(entry["API"] for entry in config["nav"] if "API" in entry)
    for kind in ALGORITHMS.values():
        if kind.__module__ not in written:
            place = page_of(kind, written)
            files.append(File.generated(config, place, content=made_page(kind)))
            navigation.append({kind.__name__: place})
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the facts on a page, and before the reference of an algorithm's module those of its algorithms."""
    return REFERENCE.sub(lambda match: f"{of_module(match['module'])}\n\n{match[0]}", rewrite(markdown))
