"""What the page is written with: escaping, tables, the style. Whatever comes from a folder passes `text`."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

from .. import sketch

_UNPRINTED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # what no document may hold
_LONGEST = 600  # characters of one name or sentence

# The colours of Okabe and Ito, which everyone tells apart; lighter ones where the page is dark.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a", "#8c6d31")
DARK = ("#4aa8e8", "#ff8a4c", "#2fcf9f", "#e39cc4", "#f2b632", "#8fd0f7", "#a8a8a8", "#c9a75e")


def _colours(colours: Sequence[str]) -> str:
    return "".join(f"--c{k}:{colour};" for k, colour in enumerate(colours))


STYLE = (
    f":root{{color-scheme:light dark;--fg:#1c1e21;--bg:#fff;--dim:#667;--rule:#d9dbe0;--warn:#a33c00;{_colours(LIGHT)}}}"
    f"@media(prefers-color-scheme:dark){{:root{{--fg:#e4e6ea;--bg:#16181c;--dim:#9aa0aa;--rule:#363a42;--warn:#ffb380;"
    f"{_colours(DARK)}}}}}"
    """
body{font:15px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);max-width:1000px;margin:0 auto;padding:24px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:19px;margin:36px 0 8px;border-bottom:1px solid var(--rule)}
h3{font-size:15px;margin:18px 0 4px}p{margin:6px 0}nav a{color:inherit;margin-right:14px}
table{border-collapse:collapse;margin:8px 0}th,td{padding:3px 14px 3px 0;text-align:left;vertical-align:top}
th{font-weight:600;border-bottom:1px solid var(--rule)}td{border-bottom:1px solid var(--rule)}
td .dim{white-space:nowrap}.two{display:flex;flex-wrap:wrap;gap:0 56px}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}
.dim{color:var(--dim)}.warn{color:var(--warn)}ul{padding-left:20px;margin:6px 0}summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font-size:12px}svg{width:100%;height:auto;display:block}svg.figure{min-width:640px}svg.small{width:auto;display:inline-block}
svg text{font:11px system-ui,sans-serif;fill:var(--fg)}svg .dim{fill:var(--dim)}svg .b{font-weight:600}
.line{fill:none;stroke-width:1.6}.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--dim);stroke-width:1}
.band{stroke:none;opacity:.18}.mark{stroke:var(--dim);stroke-dasharray:2 3}.box{fill:none;stroke:var(--dim)}
.arrow{stroke:var(--fg);stroke-width:1.3;fill:none}.reply{stroke-dasharray:5 3}.tip{fill:var(--fg)}
.legend span{margin-right:16px;white-space:nowrap}
"""
    + "".join(f".s{k}{{stroke:var(--c{k})}}.f{k}{{fill:var(--c{k})}}" for k in range(len(LIGHT)))
    + ".d1{stroke-dasharray:7 4}.d2{stroke-dasharray:2 3}.d3{stroke-dasharray:9 3 2 3}"
)


def text(value: object) -> str:
    """Any value as text of the page."""
    said = str(value)
    said = said if len(said) <= _LONGEST else said[:_LONGEST] + "..."
    return html.escape(_UNPRINTED.sub("\ufffd", said), quote=True)


def number(value: float) -> str:
    """A number, short; a dash where there is none."""
    return "-" if math.isnan(value) else sketch.number(value)


def size(count: float) -> str:
    """Bytes in words."""
    for unit, of in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= of:
            return f"{count / of:.3g} {unit}"
    return f"{count:.4g} B"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int | None = None) -> str:
    """Cells, which are markup already; those from column `numbers` on stand to the right."""
    kind = lambda k: ' class="n"' if numbers is not None and k >= numbers else ""
    line = lambda cells, tag: "".join(f"<{tag}{kind(k)}>{cell}</{tag}>" for k, cell in enumerate(cells))
    body = "".join(f"<tr>{line(cells, 'td')}</tr>" for cells in rows)
    top = f"<tr>{line(head, 'th')}</tr>" if head else ""
    return f'<div class="wide"><table>{top}{body}</table></div>'


def listed(sentences: Iterable[str], kind: str = "") -> str:
    """Sentences, escaped, one below the other."""
    mark = f' class="{kind}"' if kind else ""
    items = "".join(f"<li{mark}>{text(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def dim(sentence: str) -> str:
    """A sentence beside the matter, escaped."""
    return f'<p class="dim">{text(sentence)}</p>'


def folded(title: str, inside: str, unfolded: bool = False) -> str:
    """A part that opens when it is asked for; its title is escaped."""
    return f"<details{' open' if unfolded else ''}><summary>{text(title)}</summary>{inside}</details>"
