"""The built-in text: two splits that never overlap, the same on every call, big enough for calibration."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit import builtin_text
from quantkit.builtin_text import SPLITS, Split, builtin_documents, paragraphs, same_words
from quantkit.errors import CalibrationError


def paragraph_set(split: Split) -> set[str]:
    return {same_words(paragraph) for text in builtin_documents(split) for paragraph in paragraphs(text)}


@pytest.fixture(scope="module")
def documents() -> list[tuple[str, str]]:
    """Split key and text of everything, before it is split."""
    return [*builtin_text._topics(), *builtin_text._modules(Path(sysconfig.get_path("stdlib")))]


@pytest.fixture
def stdlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty standard library in place of the real one."""
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.get)
    monkeypatch.setattr(builtin_text, "_splits", builtin_text._splits.__wrapped__)  # past the cache
    return tmp_path


def test_no_paragraph_stands_in_both_splits() -> None:
    calibration, evaluation = paragraph_set("calibration"), paragraph_set("evaluation")
    assert len(evaluation) > 1000
    assert calibration & evaluation == set()


def test_overlap_is_real_before_it_is_removed(documents: list[tuple[str, str]]) -> None:
    """The reference repeats itself: without the removal the splits would overlap."""
    evaluation = paragraph_set("evaluation")
    shared = {
        same_words(paragraph)
        for key, text in documents
        if not builtin_text._is_evaluation(key)
        for paragraph in paragraphs(text)
        if same_words(paragraph) in evaluation
    }
    assert len(shared) > 50


def test_sizes() -> None:
    calibration, evaluation = (sum(map(len, builtin_documents(split))) for split in SPLITS)
    assert calibration > 1_100_000, "128 samples of 2048 tokens at 4 characters a token"
    assert 0.08 < evaluation / (calibration + evaluation) < 0.16


@pytest.mark.parametrize("split", SPLITS)
def test_documents_are_worth_a_window(split: Split) -> None:
    documents = builtin_documents(split)
    assert min(map(len, documents)) >= 400
    assert len(set(documents)) == len(documents)


@pytest.mark.parametrize("split", SPLITS)
def test_both_kinds_of_text_in_each_split(split: Split) -> None:
    titles = [text for text in builtin_documents(split) if "\n****" in text[:200]]
    assert len(titles) >= 5, "the language reference"
    assert len(builtin_documents(split)) - len(titles) >= 20, "docstrings"


def test_same_text_in_another_process() -> None:
    """Neither the hash seed nor the order of the file system nor -OO, which drops docstrings, shows."""
    program = (
        "import hashlib; from quantkit.builtin_text import *\n"
        "print([hashlib.sha256(repr(builtin_documents(s)).encode()).hexdigest() for s in SPLITS])"
    )
    runs = [
        subprocess.run(
            [sys.executable, *flags, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(builtin_text.__file__).parents[1])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, flags in (("1", []), ("2", ["-OO"]))
    ]
    assert runs[0] == runs[1]
    assert runs[0].count("'") == 4


def test_the_caller_owns_the_list() -> None:
    builtin_documents("evaluation").clear()
    assert builtin_documents("evaluation")


def test_only_the_standard_library_is_read() -> None:
    stdlib = Path(sysconfig.get_path("stdlib"))
    top_levels = {path.relative_to(stdlib).parts[0] for path in builtin_text._sources(stdlib)}
    assert {"email", "argparse.py"} <= top_levels
    assert top_levels.isdisjoint({"site-packages", "dist-packages", "test", "idlelib", "lib2to3", "ensurepip"})


def test_modules_are_parsed_not_imported(stdlib: Path) -> None:
    (stdlib / "json").mkdir()
    source = f'"""{"Read me. " * 60}"""\nraise SystemExit\nclass A:\n    def f(self):\n        """Deep."""\n'
    (stdlib / "json" / "tool.py").write_text(source)
    [(key, text)] = builtin_text._modules(stdlib)
    assert key == "module:json"
    assert paragraphs(text)[-1] == "Deep."


def test_topics_alone_are_enough(stdlib: Path) -> None:
    """A zipped standard library has no readable sources; the language reference can still be imported."""
    with zipfile.ZipFile(stdlib / "python.zip", "w") as archive:
        archive.writestr("json/__init__.py", '"""Docstring."""')
    assert sum(map(len, builtin_documents("calibration"))) > 200_000
    assert sum(map(len, builtin_documents("evaluation"))) > 40_000


def test_no_text_at_all(stdlib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(CalibrationError, match="carries neither docstrings nor") as error:
        builtin_documents("calibration")
    assert "\n" not in str(error.value)


def test_unknown_split() -> None:
    with pytest.raises(CalibrationError, match=r"no split 'train'.*'calibration' or 'evaluation'"):
        builtin_documents("train")  # type: ignore[arg-type]


@pytest.mark.parametrize(("module", "twin"), [("_pydatetime", "datetime"), ("_pydecimal", "decimal")])
def test_a_module_and_its_twin_share_a_split(module: str, twin: str) -> None:
    """Python 3.12 moved the docstrings of datetime to _pydatetime: they must not change sides."""
    assert builtin_text._family(module) == builtin_text._family(twin) == twin


def test_the_sides_never_change() -> None:
    """The splits are part of the shipped model: it was trained on one and is judged on the other."""
    keys = ["topic:try", "topic:with", "topic:while", "module:difflib", "module:typing", "module:email"]
    sides = [builtin_text._is_evaluation(key) for key in keys]
    assert sides == [True, True, False, True, True, False]


LINES = st.lists(st.sampled_from(["a b", " a  b", "c", "", "  "]), max_size=8).map("\n".join)


@given(st.lists(LINES, max_size=4), st.lists(LINES, max_size=4))
def test_removal_of_shared_paragraphs(texts: list[str], others: list[str]) -> None:
    """What is left has no words in common with the others; with nothing to remove, every paragraph stays."""
    long = ["x" * 400 + "\n\n" + text for text in texts]
    left = builtin_text._without_paragraphs_of(long, others)
    known = {same_words(p) for text in others for p in paragraphs(text)}
    assert [paragraphs(text) for text in left] == [
        [p for p in paragraphs(text) if same_words(p) not in known] for text in long
    ]


@given(LINES)
def test_paragraphs_round_trip(text: str) -> None:
    parts = paragraphs(text)
    assert paragraphs("\n\n".join(parts)) == parts
    assert all(part.strip() for part in parts)
    assert same_words(text) == " ".join(same_words(part) for part in parts)
