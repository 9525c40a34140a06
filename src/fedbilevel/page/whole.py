"""The page, put together: one file, no script, and nothing that another host has."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError, check
from ..results.folder import PAGE
from .clients import clients
from .curves import curves
from .ended import ended, how
from .exchanges import exchanges
from .found import Found, look
from .head import ran, settings, title
from .held import held
from .markup import STYLE, text
from .networks import networks
from .warned import warned

_SEALED = "default-src 'none'; style-src 'unsafe-inline'"  # a browser refuses whatever would ask another host


def write(folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write a results folder as a page of HTML; returns the file.

    Args:
        folder: the folder of a run, a comparison or a race; ended, killed or not yet ended.
        out: the file; None: report.html in the folder.

    Raises:
        InputError: there is no such folder, nothing of ours in it, or the file cannot be written.
    """
    place = Path(folder)
    found = look(place)
    file = place / PAGE if out is None else Path(out)
    check(not file.is_dir(), f"{file} is a folder: name a file for the page.")
    beside = file.with_name(file.name + ".new")
    try:
        beside.write_text(whole(found), encoding="utf-8")
        os.replace(beside, file)
    except OSError as error:
        raise InputError(f"the page cannot be written to {file}: {error.strerror}. Name another file.") from error
    return file


def whole(found: Found) -> str:
    """The page."""
    parts = {
        "Run": f'<div class="two">{ran(found)}{settings(found)}</div>',
        "End": ended(found),
        "Curves": curves(found),
        "Protocol": exchanges(found),
        "Clients": clients(found, held(found)),
        "Networks": networks(found),
    }
    warnings = warned(found)
    if warnings:
        parts = {"Warnings": warnings, **parts}
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name in parts)
    sections = "".join(f'<section id="{name.lower()}"><h2>{name}</h2>{part}</section>' for name, part in parts.items())
    heading = text(title(found))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{heading}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_SEALED}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f'<body><h1>{heading}</h1><p class="dim">{text(_summary(found))}</p><nav>{links}</nav>{sections}</body></html>\n'
    )


def _summary(found: Found) -> str:
    """How many runs ended how."""
    words: dict[str, int] = {}
    for run in found.runs:
        word = how(run)[0]
        words[word] = words.get(word, 0) + 1
    runs = f"{len(found.runs)} run{'s' * (len(found.runs) != 1)}"
    return f"{runs}: {', '.join(f'{many} {word}' for word, many in words.items())}" if words else "no runs"
