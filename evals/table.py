"""Markdown tables, and the results of a study put between two marks in its README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; every column but the first is set to the right."""
    marks = ["---", *["---:"] * (len(heading) - 1)]
    return "".join("| " + " | ".join(row) + " |\n" for row in (heading, marks, *rows))


def replace_results(readme: Path, results: str) -> None:
    """Print the results and put them between the marks of a README."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + BEGIN + results + END + after, encoding="utf-8")
    print(results)
