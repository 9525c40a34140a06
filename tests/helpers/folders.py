"""Results folders written by hand, as runs leave them, and pages taken apart."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

FIXED = ("iteration", "rounds", "bytes_down", "bytes_up", "seconds")
_OPEN = {"meta", "br"}  # elements without an end
ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "nav", "a", "section", "div", "span", "table",
    "tr", "th", "td", "ul", "li", "details", "summary", "pre", "b", "br",
    "svg", "path", "text", "rect", "circle", "polyline", "polygon",
}  # fmt: skip


def exchange(name="moves", down="x, y", up="8 B", times=1, most=None, **more):
    """A line of a protocol."""
    most = times if most is None else most
    paid = {
        "bytes_down": 100 * times,
        "bytes_down_most": 100 * most,
        "bytes_up": 80 * times,
        "bytes_up_most": 80 * most,
    }
    return {
        "name": name,
        "down": down,
        "up": up,
        "times": times,
        "times_most": most,
        **paid,
        "combine": ["mean"],
        **more,
    }


def protocol(*exchanges, rarely=(), each_row=(), clients=8, cohort=8, name="Lockstep"):
    """A protocol as result.json has it."""
    exchanges = exchanges or (exchange(),)
    sums = {
        key: sum(e[key] for e in exchanges) for key in ("bytes_down", "bytes_down_most", "bytes_up", "bytes_up_most")
    }
    return {
        "algorithm": name, "clients": clients, "cohort": cohort, "exchanges": list(exchanges), "rounds": len(exchanges),
        "rounds_most": len(exchanges), **sums, "kind": "exact", "each_row": list(each_row), "rarely": list(rarely),
        "rounds_rarely": len(rarely),
    }  # fmt: skip


def history(file, metrics, columns=None, n=20, seconds=0.1):
    """A history: `metrics` are name -> value of an iteration."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as text:
        rows = csv.writer(text)
        rows.writerow([*(columns or {}), *FIXED, *metrics])
        for k in range(n):
            paid = k, 2 * k, 800 * k, 640 * k, round(seconds * k, 6)
            rows.writerow([*(columns or {}).values(), *paid, *(fn(k) for fn in metrics.values())])


def config(algorithms=("lockstep",), seeds=(0,), **more):
    """A config.json of a task."""
    fields = {"inner_lr": 0.03, "local_steps": 5, "outer_lr": "auto"}
    return {
        "task": "quadratic", "options": {"dataset": "synthetic", "partition": "iid", "clients": None, "alpha": None},
        "algorithms": dict.fromkeys(algorithms, fields), "steps": dict.fromkeys(algorithms, "stored, outer_lr auto"),
        "seeds": list(seeds), "iterations": 19, "rounds": None, "cohort": None, "engine": "simulation",
        "evaluate_every": 1, "precision": 32, "clients_an_exchange": 8, **more,
    }  # fmt: skip


def told(folder, name, what):
    """A JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(what))


def head(**more):
    """A result.json."""
    return {"format": 1, "config": {"fedbilevel": "0.1.0", "jax": "0.9"}, "protocol": protocol(), "arrays": {}, **more}


FALLS = {"value": lambda k: 2.0 + 1 / (k + 1)}


def compared(folder, algorithms=("lockstep", "fednest"), seeds=(0, 1), metrics=FALLS, **more):
    """The folder of a comparison whose runs are done."""
    told(folder, "config.json", config(algorithms, seeds, **more))
    for name in algorithms:
        for seed in seeds:
            place = folder / "runs" / f"{name}-{seed}"
            history(place / "history.csv", metrics, {"algorithm": name, "seed": seed})
            told(place, "result.json", head())
            told(place, "outcome.json", {"status": "done", "iterations": 19})
    return folder


class Page(HTMLParser):
    """A page, read strictly: its text, its elements and attributes, its pictures."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.attributes, self.words, self._open = [], [], [], []
        self.feed(page)
        self.close()
        assert not self._open, self._open
        self.text = " ".join("".join(self.words).split())
        self.pictures = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in _OPEN:
            self._open.append(tag)
        self.words.append(" ")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        self.words.append(" ")

    def handle_data(self, data):
        if self._open[-1:] != ["style"]:
            self.words.append(data)


def sealed(page):
    """Read a page, and see that it holds nothing but what it may: no script, no handler, no address."""
    read = Page(page)
    assert set(read.elements) <= ALLOWED, set(read.elements) - ALLOWED
    for tag, name, value in read.attributes:
        assert not name.startswith("on") and name not in ("src", "srcset", "action", "xlink:href"), (tag, name)
        assert name != "href" or value.startswith("#"), value
        assert name != "style" or not re.search(r"url|expression|import|http", value), value
    style = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert len(style) == 1 and not re.search(r"url\(|@import|http|//", style[0])
    return read
