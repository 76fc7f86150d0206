"""Code blocks of Markdown files, and running them: what test_docs.py checks."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from typer.main import get_command
from typer.testing import CliRunner

from quantkit.cli import app
from quantkit.errors import QuantkitError

_FENCE = re.compile(r"^```(\w*)[ ]?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTIONAL = ("peft", "lm_eval", "vllm", "sglang")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the file name behind it if there is one, its first line's number, its text."""

    language: str
    name: str
    line: int
    text: str


def blocks_of(text: str) -> list[Block]:
    return [Block(m[1], m[2], text[: m.start()].count("\n") + 2, m[3]) for m in _FENCE.finditer(text)]


def commands_of(block: Block) -> Iterator[tuple[str, str]]:
    """The commands of a console block (``$ ...``, continued by a backslash), each with the output below it."""
    parts = re.split(r"^\$ ", block.text.replace("\\\n", " "), flags=re.MULTILINE)
    assert parts[0] == "", "a console block begins with a command"
    for part in parts[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def run_command(command: str) -> str:
    """Run ``quantkit ...`` in this process, ``cat`` and ``ls`` by hand; returns what is printed, errors included."""
    words = shlex.split(command, comments=True)
    if words[0] in ("cat", "ls"):
        paths = [Path(word) for word in words[1:]]
        if words[0] == "cat":
            return "".join(path.read_text() for path in paths)
        return "".join(f"{entry.name}\n" for path in paths for entry in sorted(path.iterdir()))
    assert words[0] == "quantkit", f"not a command that documentation may show: {command}"
    done = CliRunner().invoke(app, words[1:])
    if isinstance(done.exception, QuantkitError):
        return f"{done.output}error: {done.exception}\n"
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return str(done.output)


def run_python(text: str, space: dict[str, Any]) -> str:
    """Run a block of Python in a page's name space; returns what it prints."""
    captured = io.StringIO()
    with redirect_stdout(captured):
        exec(compile(text, "block", "exec"), space)
    return captured.getvalue()


def check_synopsis(line: str) -> None:
    """A line such as ``quantkit quantize MODEL --output DIR  # why`` names a verb and options that exist."""
    words = shlex.split(line, comments=True)
    assert words[0] == "quantkit", line
    verb = get_command(app).commands[words[1]]  # type: ignore[attr-defined]
    verb.make_context(words[1], words[2:])


def missing_package(text: str) -> str | None:
    """The package that a block needs, where it is an optional one that is not installed."""
    needed = ("lm_eval",) if text.startswith("quantkit eval") else OPTIONAL
    used = [
        name for name in needed if text.startswith("quantkit eval") or re.search(rf"\b(import|from) {name}\b", text)
    ]
    return next((name for name in used if find_spec(name) is None), None)


def differs(found: str, expected: str) -> str | None:
    """Why an output is not the expected one; None when it is.

    A line ``...`` stands for any lines, ``...`` within a line for any words, ``...end`` for a word that ends so.
    Numbers may differ by 5 %: the text that Python carries, on which most were measured, changes a little with
    Python's version. White space does not count.
    """
    lines = [line.split() for line in found.splitlines() if line.strip()]
    chunks = re.split(r"^\s*\.\.\.\s*$", expected, flags=re.MULTILINE)
    for number, chunk in enumerate(chunks):
        wanted = [line.split() for line in chunk.splitlines() if line.strip()]
        places = range(len(lines) - len(wanted) + 1)
        if number == 0:  # nothing before the first lines, and nothing behind the last, that is not written
            places = places[:1]
        if number == len(chunks) - 1:
            places = places[-1:] if number or len(lines) == len(wanted) else range(0)
        at = next((i for i in places if _match(lines[i:], wanted)), None)
        if at is None:
            return f"no lines like\n{chunk.strip()}\nin\n" + "\n".join(map(" ".join, lines))
        lines = lines[at + len(wanted) :]
    return None


def _match(lines: list[list[str]], wanted: list[list[str]]) -> bool:
    return all(_same_words(line, want) for line, want in zip(lines, wanted, strict=False))


def _same_words(line: list[str], want: list[str]) -> bool:
    if not want or want[0] != "...":
        return line == want == [] or bool(
            line and want and _same_word(line[0], want[0]) and _same_words(line[1:], want[1:])
        )
    return any(_same_words(line[i:], want[1:]) for i in range(len(line) + 1))


def _same_word(found: str, want: str) -> bool:
    if want.startswith("..."):
        return found.endswith(want[3:])
    numbers = [re.sub(r"[,%();:]", "", word) for word in (found, want)]
    try:
        a, b = map(float, numbers)
    except ValueError:
        return found == want
    return abs(a - b) <= 0.05 * abs(b) + 1e-12
