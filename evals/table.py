"""Markdown tables of results, put between two marks in a README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; every column but the first is set to the right."""
    marks = ["---", *["---:"] * (len(heading) - 1)]
    return "".join("| " + " | ".join(row) + " |\n" for row in (heading, marks, *rows))


def replace_table(readme: Path, table: str) -> None:
    """Put the table between the marks of a README."""
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + BEGIN + table + END + after)
