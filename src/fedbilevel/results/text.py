"""Tables of words: headings, and the cells of each row."""

from __future__ import annotations

from typing import TypeAlias

Text: TypeAlias = tuple[list[str], list[list[str]]]  # headings, and the cells of each row


def pipe_table(head: list[str], rows: list[list[str]]) -> str:
    """Text cells as a Markdown table, to the letter: no cell is taken for a number.

    Args:
        head: the headings; some may be alike.
        rows: of as many cells each.
    """
    import pandas
    from tabulate import DataRow, TableFormat

    cells = DataRow("|", "|", "|")
    ruled = TableFormat(  # tabulate's own rule below the headings is as wide as the widest cells
        lineabove=None, linebelowheader=lambda widths, _: "| " + " | ".join(["---"] * len(widths)) + " |",
        linebetweenrows=None, linebelow=None, headerrow=cells, datarow=cells, padding=1, with_header_hide=None,
    )  # fmt: skip
    table = pandas.DataFrame(rows, columns=pandas.Index(head), dtype=str)
    as_it_is = {"disable_numparse": True, "stralign": None, "numalign": None}
    return table.to_markdown(index=False, tablefmt=ruled, **as_it_is) + "\n"
