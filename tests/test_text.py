"""Sources: builtin, files, directories and hub datasets, opened lazily; and the evaluation text."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pytest

from quantkit.errors import CalibrationError
from quantkit.text import Split, evaluation_text, open_source


def read(source: str, split: Split = "calibration", column: str | None = None) -> list[str]:
    return list(chain.from_iterable(open_source(source, split=split, column=column).streams))


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(CalibrationError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


# files and directories


def test_a_directory_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "b" / "z.txt").write_text("third")
    (tmp_path / "b" / "a.JSONL").write_text('{"text": "second"}')
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.json").write_text('[{"text": "fourth"}]')
    for ignored in (".hidden.txt", ".cache/x.txt", "README.md", "photo.png"):
        (tmp_path / ignored).write_bytes(b"\xff")
    assert read(str(tmp_path)) == ["first", "second", "third", "fourth"]


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n')
    (tmp_path / "b.jsonl").write_text("broken")
    first, second = open_source(str(tmp_path), split="calibration").streams
    assert next(first) == "good"
    assert "b.jsonl, line 1" in error_of(lambda: next(second))


def test_a_cut_reads_only_what_it_wants(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("0123456789" * 10)
    opened = open_source(str(path), split="calibration", cut=lambda document: [document.read(7)])
    assert list(opened.streams[0]) == ["0123456"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("missing.txt", "missing.txt: no such file or directory; give builtin, hf:NAME, or an existing"),
        ("missing", "no such file or directory"),
        ("", "no source; give builtin, hf:NAME"),
        ("x" * 5000, "cannot be opened"),
        ("table.csv", "'.csv' is not a kind of text file that can be read; give one of .txt, .jsonl"),
        ("table.csv:text", "'.csv' is not a kind of text file"),
        ("empty", "no text file in the directory (1 files of other kinds)"),
    ],
)
def test_what_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("no")
    assert said in error_of(lambda: open_source(source, split="calibration"))


def test_a_column_after_the_path(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "t", "a:b": "x"}')
    assert read(f"{path}:title") == ["t"]
    assert read(f"{path}:title", column="title") == ["t"]
    assert read(str(path), column="a:b") == ["x"]
    assert read(f"{tmp_path}:title") == ["t"]
    assert "name one column" in error_of(lambda: read(f"{path}:title", column="body"))


def test_a_colon_in_an_existing_name_is_part_of_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    (tmp_path / "a.txt:b.txt").write_text("long")
    assert read(f"{tmp_path}/a.txt:b.txt") == ["long"]


def test_a_column_where_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    for source in (f"{tmp_path}/a.txt:text", f"{tmp_path}:text"):
        assert "column 'text' of a source that has no columns" in error_of(lambda s=source: read(s))  # type: ignore[misc]
    assert "no columns" in error_of(lambda: read("builtin", column="text"))


# builtin


def test_builtin_splits_do_not_overlap() -> None:
    calibration, evaluation = read("builtin"), read("builtin", "evaluation")
    assert len(calibration) > len(evaluation) > 0
    assert not set(calibration) & set(evaluation)


# the hub, through a local dataset directory and without a network


@pytest.fixture
def dataset_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "dataset"
    directory.mkdir()
    for name in ("train", "test"):
        rows = [{"text": f"{name} {number}", "id": number} for number in range(3)]
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory


def test_a_local_dataset_directory(dataset_directory: Path) -> None:
    source = f"hf:{dataset_directory}"
    assert read(source) == ["train 0", "train 1", "train 2"]
    assert read(source, "evaluation") == ["test 0", "test 1", "test 2"]
    assert read(f"{source}:test") == read(f"{source}::text", "evaluation") == read(source, "evaluation")
    assert open_source(source, split="calibration").name == f"{source}:train"


def test_hub_splits_and_columns_that_are_not_there(dataset_directory: Path) -> None:
    source = f"hf:{dataset_directory}"
    assert "no split dev; name one of: train, test" in error_of(lambda: read(f"{source}:dev"))
    assert "no column 'body'; name one of: text, id" in error_of(lambda: read(f"{source}:train:body"))
    assert "slices are not read" in error_of(lambda: read(f"{source}:train[:10%]"))
    (dataset_directory / "train.jsonl").write_text("{")
    assert "cannot be read" in error_of(lambda: read(source))


def test_an_unreachable_hub_is_one_line() -> None:
    code = (
        "from quantkit.errors import CalibrationError\n"
        "from quantkit.text import open_source\n"
        "for source in ('hf:no-such/thing', 'hf:a/b/c:train'):\n"
        "    try: open_source(source, split='calibration')\n"
        "    except CalibrationError as error: print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("hf:no-such/thing: Couldn't reach 'no-such/thing' on the Hub")
    assert "'no-such'" in lines[0].replace("'no-such/thing'", "")  # the second reading was tried, too
    assert lines[1].startswith("hf:a/b/c:train: Couldn't reach 'a/b'")
    assert all("give a local file" in line for line in lines)


@pytest.mark.parametrize("name", ["", "a/", "/b", "a//b", "a/b/c/d"])
def test_names_that_are_no_datasets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise FileNotFoundError("not reached for a name that is malformed")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    error_of(lambda: open_source(f"hf:{name}", split="calibration"))


Load = Callable[..., dict[str, list[dict[str, Any]]]]


def hub_with(known: dict[tuple[str, str | None], dict[str, list[dict[str, Any]]]], calls: list[bool]) -> Load:
    """A hub that holds some datasets: it stands in for the network, which tests do not have."""

    def load(path: str, name: str | None, *, streaming: bool) -> dict[str, list[dict[str, Any]]]:
        calls.append(streaming)
        if (path, name) not in known:
            raise datasets.exceptions.DatasetNotFoundError(f"no {path}/{name}")
        return known[path, name]

    return load


@pytest.mark.parametrize(
    ("source", "split", "name"),
    [
        ("hf:one", "calibration", "hf:one:train"),
        ("hf:org/name", "calibration", "hf:org/name:train"),
        ("hf:one/config", "calibration", "hf:one/config:train"),
        ("hf:org/name/config", "calibration", "hf:org/name/config:train"),
        ("hf:org/name/config", "evaluation", "hf:org/name/config:validation"),
        ("hf:one/config", "evaluation", "hf:one/config:test"),
        ("hf:one/config:validation:text", "evaluation", "hf:one/config:validation"),
    ],
)
@pytest.mark.parametrize("offline", [True, False])
def test_names_configs_and_default_splits(
    monkeypatch: pytest.MonkeyPatch, source: str, split: Split, name: str, offline: bool
) -> None:
    rows = [{"text": "x"}]
    known: dict[tuple[str, str | None], dict[str, list[dict[str, Any]]]] = {
        ("one", None): {"train": rows},
        ("org/name", None): {"train": rows},
        ("one", "config"): {"train": rows, "validation": rows, "test": rows},
        ("org/name", "config"): {"train": rows, "validation": rows},
    }
    calls: list[bool] = []
    monkeypatch.setattr(datasets, "load_dataset", hub_with(known, calls))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    opened = open_source(source, split=split)
    assert opened.name == name
    assert list(opened.streams[0]) == ["x"]
    assert set(calls) == {not offline}  # streamed, except from the cache


def test_evaluation_does_not_fall_back_to_the_training_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", hub_with({("one", None): {"train": []}}, []))
    assert "no split test or validation; name one of: train" in error_of(lambda: read("hf:one", "evaluation"))


# evaluation


def test_evaluation_text_of_one_file_is_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    body = " = Title = \r\n\n text <unk> é\n"
    path.write_bytes(body.encode())
    result = evaluation_text(str(path))
    assert result.text == body
    assert result.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (result.source, result.num_documents) == (str(path), 1)


def test_evaluation_text_joins_documents_and_keeps_empty_ones(tmp_path: Path) -> None:
    rows = ["", " = A = \n", "", "text\n"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    result = evaluation_text(str(path))
    assert result.text == "\n\n".join(rows)
    assert result.num_documents == 4


def test_evaluation_text_with_chats(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}')
    result = evaluation_text(str(path), chat_template=lambda turns: turns[0]["content"] * 2)
    assert result.text == "hihi"


@pytest.mark.parametrize("body", ["", " \n\n "])
def test_no_evaluation_text(tmp_path: Path, body: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(body)
    assert "there is no text in it" in error_of(lambda: evaluation_text(str(path)))


def test_builtin_evaluation_text_is_the_evaluation_split() -> None:
    result = evaluation_text("builtin")
    assert result.text == "\n\n".join(read("builtin", "evaluation"))
    assert result.sha256 == hashlib.sha256(result.text.encode()).hexdigest()


def test_importing_the_module_is_light() -> None:
    heavy = {"datasets", "pyarrow", "torch", "transformers"}
    code = f"import sys, quantkit.text; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
