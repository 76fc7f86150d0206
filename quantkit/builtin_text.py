"""The `builtin` text source: the English that every Python installation carries.

The language reference of ``pydoc_data.topics`` and the docstrings of the standard library are read at run
time, so that calibration, evaluation and first steps need no network and no copied data set. Modules are
parsed with ``ast``, never imported. The text differs a little from one Python version to the next, so figures
on it compare only under the same Python; which split a topic or a module belongs to never changes.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from quantkit.errors import CalibrationError, message

Split = Literal["calibration", "evaluation"]
SPLITS: tuple[Split, ...] = ("calibration", "evaluation")
_EVALUATION_SHARE = 0.12

# Test suites, demonstrations and bundled tools: not everywhere installed, and hardly any prose.
_EXCLUDED = frozenset({"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings"})
_MIN_CHARS = 400  # a shorter document is boilerplate ("Entry point for ...")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# The one salt under 3000 whose evaluation split has its share of topics and of modules alike, with no package
# above 15 % of it, on Python 3.10 to 3.13. The shipped model was trained on this split; keep it.
_SPLIT_SALT = 1856
_BLANK_LINES = re.compile(r"\n\s*\n")


class _Document(NamedTuple):
    """One text, its paragraphs separated by blank lines, and the key that decides its split."""

    split_key: str
    text: str


def builtin_documents(split: Split) -> list[str]:
    """The documents of one split, in a fixed order; no paragraph stands in both splits.

    The reference repeats itself (the topic "compound" holds the whole of "with"), so every paragraph that
    stands in both splits is left out of the calibration split, which has text to spare.

    Args:
        split: "calibration" (about 88 % of the text) or "evaluation".
    Raises:
        CalibrationError: there is no such split, or this Python carries no text.
    """
    if split not in SPLITS:
        allowed = " or ".join(repr(name) for name in SPLITS)
        raise CalibrationError(message("builtin text", f"there is no split {split!r}", f"choose {allowed}"))
    calibration, evaluation = _splits()
    return list(calibration if split == "calibration" else evaluation)


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text (what stands between blank lines), with their line breaks."""
    return [part for part in _BLANK_LINES.split(text.strip("\n")) if part.strip()]


def same_words(paragraph: str) -> str:
    """What two paragraphs have in common when only their indentation and line breaks differ."""
    return " ".join(paragraph.split())


@functools.cache
def _splits() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Calibration and evaluation documents. Cached: parsing the standard library takes seconds."""
    documents = [*_topics(), *_modules(Path(sysconfig.get_path("stdlib")))]
    unique = {doc.text: doc.split_key for doc in documents}  # some topics are the same text twice
    evaluation = [text for text, key in unique.items() if _is_evaluation(key)]
    calibration = [text for text, key in unique.items() if not _is_evaluation(key)]
    calibration = _without_paragraphs_of(calibration, evaluation)
    if not calibration or not evaluation:
        raise CalibrationError(
            message(
                "builtin text",
                f"this Python ({sys.prefix}) carries neither docstrings nor the language reference",
                "give a text file or a data set as the source instead",
            )
        )
    return tuple(calibration), tuple(evaluation)


def _is_evaluation(split_key: str) -> bool:
    """Whether a document belongs to the evaluation split: a hash of its key, the same on every Python."""
    digest = hashlib.sha256(f"{_SPLIT_SALT}:{split_key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < _EVALUATION_SHARE * 2**64


def _without_paragraphs_of(texts: Iterable[str], others: Iterable[str]) -> list[str]:
    """The texts without the paragraphs that also stand in the others; what is left too short is dropped."""
    known = {same_words(paragraph) for text in others for paragraph in paragraphs(text)}
    kept = ("\n\n".join(p for p in paragraphs(text) if same_words(p) not in known) for text in texts)
    return [text for text in kept if len(text) >= _MIN_CHARS]


def _topics() -> Iterator[_Document]:
    """The language reference, one document per topic; nothing where a distribution leaves it out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        text = "\n\n".join(paragraphs(topics[name]))
        if len(text) >= _MIN_CHARS:
            yield _Document(f"topic:{name}", text)


def _modules(stdlib: Path) -> Iterator[_Document]:
    """The docstrings of the standard library, one document per module, in the order of their paths."""
    for path in _sources(stdlib):
        top_level = path.relative_to(stdlib).parts[0].removesuffix(".py")
        text = _docstrings(path)
        if len(text) >= _MIN_CHARS:
            yield _Document(f"module:{_family(top_level)}", text)


def _family(top_level: str) -> str:
    """The name that a module and its pure Python twin share: "datetime" of "_pydatetime"."""
    return top_level.removeprefix("_py").removeprefix("_") or top_level


def _sources(stdlib: Path) -> Iterator[Path]:
    """The source files of the standard library proper, sorted; nothing where it is a zip archive."""
    for folder, subfolders, files in os.walk(stdlib):
        if Path(folder) == stdlib:  # site-packages and build files stand here too
            subfolders[:] = [name for name in subfolders if name in sys.stdlib_module_names]
            files = [name for name in files if name.removesuffix(".py") in sys.stdlib_module_names]
        subfolders[:] = sorted(set(subfolders) - _EXCLUDED)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _docstrings(path: Path) -> str:
    """The docstrings of one source file, in the order of the source; empty for a file that has none."""
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return ""
    return "\n\n".join(text for doc in _docstrings_in(ast.parse(source)) for text in paragraphs(doc))


def _docstrings_in(node: ast.AST) -> Iterator[str]:
    """The docstring of a module, class or function and then of those in it; expressions are not visited."""
    if isinstance(node, _DOCUMENTED) and (doc := ast.get_docstring(node)):
        yield doc
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler)):
            yield from _docstrings_in(child)
