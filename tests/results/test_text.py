"""Tables of words as Markdown: every cell stands there as it was given."""

from fedbilevel.results import pipe_table


def test_cells_stay_as_they_are():
    rows = [["Lockstep (ours)", "010", "1,234", "1e5"], ["FedNest, full", "0.50", "-", "**9 s**"]]
    lines = pipe_table(["algorithm", "MB", "MB", ""], rows).splitlines()
    assert lines[0] == "| algorithm | MB | MB |  |"
    assert lines[1] == "| --- | --- | --- | --- |"
    assert lines[2:] == ["| Lockstep (ours) | 010 | 1,234 | 1e5 |", "| FedNest, full | 0.50 | - | **9 s** |"]


def test_a_table_without_rows_has_its_headings():
    assert pipe_table(["a", "b"], []).splitlines()[0] == "| a | b |"
