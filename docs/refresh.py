"""Put the tables, figures and step sizes of finished studies into the repository: python docs/refresh.py [FOLDER]

FOLDER holds a folder for each study, as `fedbilevel reproduce all --data-dir DATA --out FOLDER` leaves it. Of each: tables
go to docs/tables/STUDY, figures to docs/images, step sizes to what `--checked-in` takes; then every table that stands
between `<!-- STUDY/TABLE -->` and `<!-- end -->` on a page is written anew, and so is what classes say of themselves
(`facts.py`); without FOLDER only that.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import facts

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "studies" / "src"))  # as facts does for the library

from fedbilevel_studies.catalogue import STUDIES

DOCS = Path(__file__).resolve().parent
FOUND = DOCS.parent / "studies" / "src" / "fedbilevel_studies" / "found"
TABLE = re.compile(r"(?P<start><!-- (?P<study>(?!facts/)[\w-]+)/(?P<table>[\w-]+) -->\n).*?(?P<end><!-- end -->)", re.S)
TOO_LONG = ("history.csv", "shares.csv", "grid.csv", "tuning.csv")


def keep(place: Path) -> None:
    """Copy what a finished study left."""
    name, kept = place.name, DOCS / "tables" / place.name
    kept.mkdir(parents=True, exist_ok=True)
    for file in [*place.glob("*.csv"), *place.glob("*.md"), *place.glob("*.tex")]:
        if file.name not in TOO_LONG:
            shutil.copy(file, kept / file.name)
    figures = [place / f"{STUDIES[name].metric}.png"] if name in STUDIES else place.glob("*.png")
    for figure in figures:
        own = f"{name}.png" if name in (*STUDIES, "family", "tuning") else f"why-{figure.name}"
        shutil.copy(figure, DOCS / "images" / own)
    if name in STUDIES:
        shutil.copy(place / "settings.toml", FOUND / f"{name}.toml")


def rewrite(text: str) -> str:
    """A page with the tables that are kept."""

    def table(match: re.Match[str]) -> str:
        return match["start"] + "\n" + kept(match["study"], match["table"]) + "\n" + match["end"]

    return TABLE.sub(table, text)


def kept(study: str, table: str) -> str:
    """The Markdown of a table that is kept."""
    return (DOCS / "tables" / study / f"{table}.md").read_text()


def main() -> None:
    folders = [Path(word) for word in sys.argv[1:]]
    if len(folders) > 1 or not all(folder.is_dir() for folder in folders):
        sys.exit("usage: python docs/refresh.py [FOLDER], where FOLDER holds a folder for each study")
    for place in sorted(place for folder in folders for place in folder.iterdir()):
        if list(place.glob("*.png")):  # the last that a study writes
            keep(place)
            print(f"{place.name}: kept")
    for page in [DOCS.parent / "README.md", *sorted(DOCS.glob("**/*.md"))]:
        page.write_text(facts.rewrite(rewrite(page.read_text())))


if __name__ == "__main__":
    main()
