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

    table = pandas.DataFrame(rows, columns=pandas.Index(head), dtype=str)
    as_it_is = {"disable_numparse": True, "stralign": None, "numalign": None}
    return table.to_markdown(index=False, tablefmt="pipe", **as_it_is) + "\n"
