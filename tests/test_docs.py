"""Every code block of README.md and docs/ is run, page by page, in an empty directory of its own.

``console`` and ``python`` blocks are executed in order, ``text`` behind Python is what it prints, ``yaml`` is read as a
recipe, ``sh`` is a synopsis, whose verbs and options must exist. A ``yaml`` or ``text`` fence may name a file to write.
Commands that need more than this process (``make``, ``pip``, other clients) are only checked for being known ones.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from markdown_blocks import (
    Block,
    blocks_of,
    check_synopsis,
    commands_of,
    differs,
    missing_package,
    run_command,
    run_python,
)

from quantkit.recipe import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = re.compile(r"make ([\w-]+)|pip install .*|vllm serve .*|python -m sglang\.launch_server .*|cd evals && .*")
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def is_elsewhere(command: str) -> bool:
    """Whether a command is one that is not run here; a target of make must exist."""
    found = ELSEWHERE.fullmatch(command.split("  #")[0].strip())
    return found is not None and (found[1] is None or found[1] in TARGETS)


def run_block(block: Block, before: Block | None, space: dict[str, Any], printed: str) -> str:
    """Run one block; returns what it printed."""
    if block.language == "console":
        for command, expected in commands_of(block):
            if is_elsewhere(command) or missing_package(command):
                continue
            reason = differs(run_command(command), expected)
            assert reason is None, f"line {block.line}: $ {command}\n{reason}"
    elif block.language == "python":
        if missing_package(block.text) is None:
            return run_python(block.text, space)
        return "..."
    elif block.language == "text" and block.name:
        Path(block.name).write_text(block.text)
    elif block.language == "text":
        assert before is not None, f"line {block.line}: text belongs behind Python"
        assert before.language == "python", f"line {block.line}: text belongs behind Python"
        reason = None if printed == "..." else differs(printed, block.text)
        assert reason is None, f"line {block.line}: {reason}"
    elif block.language == "yaml":
        path = Path(block.name or "recipe.yaml")
        path.write_text(block.text)
        load_recipe(path)
    elif block.language == "sh":
        for line in filter(None, block.text.splitlines()):
            if not is_elsewhere(line):
                check_synopsis(line)
    else:
        pytest.fail(f"line {block.line}: a block in {block.language or 'no language'} is not run")
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    space: dict[str, Any] = {"__name__": "__main__"}  # a name that dataclasses find
    before: Block | None = None
    printed = ""
    blocks = blocks_of(page.read_text(encoding="utf-8"))
    assert len(blocks) == len(re.findall(r"^```\w", page.read_text(encoding="utf-8"), flags=re.MULTILINE))
    for block in blocks:
        printed = run_block(block, before, space, printed)
        before = block


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"(docs/{page.name})" in text for page in PAGES[1:])


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("a 1.00\nb\n", "a 1.04\nb\n", True),
        ("a 1.00\n", "a 1.06\n", False),
        ("a 1,000 5%\n", "a 1001 5.1%\n", True),
        ("a\nb\nc\nd\n", "a\n...\nd\n", True),
        ("a\nb\nc\n", "a\n...\nd\n", False),
        ("a b c d\n", "a ... d\n", True),
        ("a b c\n", "a ... d\n", False),
        ("a b c d e\n", "a ... c ... e\n", True),
        ("/tmp/x/out: b\n", ".../out: b\n", True),
        ("/tmp/x/out b\n", ".../out: b\n", False),
        ("w4a16 done\n", "w3a16 done\n", False),
        ("a\n", "a\nb\n", False),
        ("a\nb\n", "a\n", False),
        ("a\nb\n", "b\n", False),
        ("a\nb\n", "...\nb\n", True),
        ("a\nb\n", "a\n...\n", True),
        ("", "", True),
    ],
)
def test_what_counts_as_the_same_output(found: str, expected: str, same: bool) -> None:
    assert (differs(found, expected) is None) == same
