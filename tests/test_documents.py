"""Documents out of single files and records: columns, chats, and every way in which a file can be broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit import documents
from quantkit.documents import ChatTemplate, documents_of, read_file, whole
from quantkit.errors import CalibrationError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def render(turns: list[dict[str, str]]) -> str:
    return "|".join(f"{turn['role']}={turn['content']}" for turn in turns)


def refuse(turns: list[dict[str, str]]) -> str:
    raise ValueError("roles must alternate")


def read(path: Path, column: str | None = None, chat: ChatTemplate | None = None) -> list[str]:
    return list(read_file(path, column=column, chat_template=chat, cut=whole))


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(CalibrationError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    return text


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_parquet(path: Path, **columns: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


# .txt


@pytest.mark.parametrize("text", ["", "a", "one\r\ntwo\n\n", "\n\n", "ünï \U0001f600 end"])
def test_a_txt_file_is_one_document_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert read(path) == [text]


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    for name, body in (("a.txt", "x"), ("a.jsonl", '{"text": "x"}'), ("a.json", '[{"text": "x"}]')):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + body.encode())
        assert read(path) == ["x"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
@pytest.mark.parametrize("before", [0, 1, 5, 8191, (1 << 20) - 1, (1 << 20) - 3, (1 << 20) + 7])
@pytest.mark.parametrize("bad", [b"\xff", b"\xe2\x82", b"\xed\xa0\x80"])
def test_invalid_utf8_names_the_file_and_the_byte(tmp_path: Path, name: str, before: int, bad: bytes) -> None:
    path = tmp_path / name
    # "€" is three bytes, so blocks of the scan end inside of characters.
    head = ("€" * (before // 3)).encode() + b"a" * (before % 3)
    path.write_bytes(head + bad + b" tail")
    assert f"a{path.suffix}: byte {before} is not valid UTF-8" in error_of(lambda: read(path))


def test_utf8_that_ends_inside_a_character(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\xe2\x82")
    assert "byte 3 is not valid UTF-8" in error_of(lambda: read(path))


def test_a_missing_file_is_a_calibration_error(tmp_path: Path) -> None:
    for suffix in documents.SUFFIXES:
        assert f"gone{suffix}: cannot be read" in error_of(lambda s=suffix: read(tmp_path / f"gone{s}"))  # type: ignore[misc]


# .jsonl and .json


def test_jsonl_takes_the_only_text_column_and_skips_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "text": "one"}\n\n{"id": 2, "text": null}\n{"id": 3, "text": "two\\n"}')
    assert read(path) == ["one", "", "two\n"]


def test_a_named_column_wins_over_the_guess(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"title": "t", "body": "b"})
    assert read(path, "body") == ["b"]
    error = error_of(lambda: read(path))
    assert "2 of its columns hold text: title, body" in error
    assert "line 1: no column 'text'; name one of: title, body" in error_of(lambda: read(path, "text"))


def test_a_column_that_may_hold_text_further_on_makes_the_guess_ambiguous(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"title": "t", "body": None}, {"title": "u", "body": "b"})
    assert "title, body" in error_of(lambda: read(path))
    path = write_lines(tmp_path / "b.jsonl", {"title": "t"}, {"title": "u", "body": "b"})
    assert "title, body" in error_of(lambda: read(path))


def test_no_text_column_lists_the_columns(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"id": 1, "tags": ["x"]})
    assert "none of its columns (id, tags) holds text" in error_of(lambda: read(path))
    assert "column 'tags': list is not text" in error_of(lambda: read(path, "tags"))


def test_a_record_without_the_column_is_refused_where_it_stands(tmp_path: Path) -> None:
    records = [{"text": "a"}] * (documents.GUESS_RECORDS + 3) + [{"other": "b"}]
    path = write_lines(tmp_path / "a.jsonl", *records)
    assert f"line {len(records)}: no column 'text'; name one of: other" in error_of(lambda: read(path))


@pytest.mark.parametrize("record", ["just text", 3, None, ["a"]])
def test_a_record_that_is_no_object(tmp_path: Path, record: object) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "a"}, record)
    assert "a.jsonl, line 2: a record is a JSON object" in error_of(lambda: read(path))
    alone = write_lines(tmp_path / "b.json", record)
    assert "a record is a JSON object" in error_of(lambda: read(alone))


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl, line 2: malformed JSON at column"),
        ("a.json", '\n[{"text": "a"},\n {"text" "b"}]', "a.json, line 3: malformed JSON at column 10"),
        ("a.json", '{"text": "a"}\n{]', "a.json, line 2: malformed JSON at column 2"),
        ("a.jsonl", "[" * 200_000, "a.jsonl, line 1: JSON nested too deeply"),
    ],
)
def test_malformed_json_names_the_file_and_the_line(tmp_path: Path, name: str, text: str, where: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert where in error_of(lambda: read(path))


def test_json_is_an_array_or_one_object_a_line(tmp_path: Path) -> None:
    array = tmp_path / "array.json"
    array.write_text(' \n[{"text": "a"}, {"text": "b"}]')
    lines = tmp_path / "lines.json"
    lines.write_text('{"text": "a"}\n{"text": "b"}')
    assert read(array) == read(lines) == ["a", "b"]


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ok \\ud83d\\ude00"}\n{"text": "ab\\ud83d"}')
    error = error_of(lambda: read(path))
    assert "line 2, column 'text': half a surrogate pair at character 2" in error


def test_a_json_value_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "short"}, {"text": "x" * 100})
    monkeypatch.setattr(documents, "MAX_JSON_CHARACTERS", 80)
    assert "a.jsonl, line 2: a JSON value of more than 80 characters" in error_of(lambda: read(path))
    path.write_text("[" + path.read_text() + "]")
    assert "a JSON value of more than 80 characters" in error_of(lambda: read(path.rename(tmp_path / "b.json")))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=130))
def test_records_give_their_text_back(texts: list[str]) -> None:
    records = [(f"row {number}", {"id": number, "text": text}) for number, text in enumerate(texts)]
    assert list(documents_of(records, "s", column=None, chat_template=None)) == texts


# parquet


def test_parquet_guesses_by_type_and_reads_by_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PARQUET_BATCH_ROWS", 7)
    texts = [f"text {number}" for number in range(150)] + [None]
    path = write_parquet(tmp_path / "a.parquet", id=list(range(151)), body=texts)
    assert read(path) == [text or "" for text in texts]


@pytest.mark.parametrize("kind", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_parquet_knows_all_kinds_of_strings(tmp_path: Path, kind: pyarrow.DataType) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=pyarrow.array(["a", "b"]).cast(kind), n=[1, 2])
    assert read(path) == ["a", "b"]


def test_parquet_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", title=["t"], body=["b"], n=[1])
    assert "hold text: title, body" in error_of(lambda: read(path))
    assert read(path, "title") == ["t"]
    assert "no column 'x'; name one of: title, body, n" in error_of(lambda: read(path, "x"))
    assert "row 1, column 'n': int is not text" in error_of(lambda: read(path, "n"))


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["a" * 1000])
    path.write_bytes(path.read_bytes()[:-20])
    assert "a.parquet: cannot be read" in error_of(lambda: read(path))


# chats


def test_chats_go_through_the_template(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", {"n": 1, "messages": CHAT}, {"n": 2, "messages": CHAT[:1]})
    parquet = write_parquet(tmp_path / "a.parquet", n=[1, 2], conversations=[CHAT, CHAT[:1]])
    assert read(lines, chat=render) == ["user=hi|assistant=yes", "user=hi"]
    assert read(parquet, chat=render) == ["user=hi|assistant=yes", "user=hi"]


def test_chats_without_a_template_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"messages": CHAT})
    error = error_of(lambda: read(path))
    assert "a.jsonl, line 1, column 'messages': holds chats, and there is no chat template" in error


def test_a_chat_that_the_template_refuses(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"messages": CHAT})
    assert "the chat template refuses it (roles must alternate)" in error_of(lambda: read(path, chat=refuse))


@pytest.mark.parametrize(
    "chat",
    [[{"from": "human", "value": "hi"}], [{"role": "user", "content": None}], [], [{"role": "user"}, "x"]],
)
def test_what_is_not_a_chat_is_refused(tmp_path: Path, chat: object) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"messages": chat})
    error_of(lambda: read(path, "messages", render))
