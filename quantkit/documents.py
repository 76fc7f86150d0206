"""Documents out of one text file or table; ``text.py`` finds the files and opens the hub.

A table (.jsonl, .json, .parquet, a hub dataset) is a stream of records, each with the place it stands at, so
that every error names a file and a line, row or record. One column holds the documents: strings, or chats.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from quantkit.errors import CalibrationError, message

ChatTemplate: TypeAlias = Callable[[list[dict[str, str]]], str]
"""Turns the turns of a chat into text; raises ValueError where it refuses them."""
Cut: TypeAlias = Callable[[TextIO], Iterable[str]]
"""Turns one open document into the strings that are read from it: all of it, its head, or piece by piece."""
Record: TypeAlias = tuple[str, object]
"""Where a record stands ("data.jsonl, line 3"), and its value, a dict if all is well."""

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
# Python's json holds a value whole: a larger one is refused instead of filling the memory.
MAX_JSON_CHARACTERS = 1 << 30
# How many records are looked at to find the text column.
GUESS_RECORDS = 100
PARQUET_BATCH_ROWS = 256
_CHAT_EXAMPLE = '[{"role": ..., "content": ...}]'


def whole(document: TextIO) -> Iterator[str]:
    """The plain cut: a document as one string."""
    yield document.read()


def cut_each(documents: Iterable[str], cut: Cut) -> Iterator[str]:
    """Apply a cut to documents that are strings already."""
    for document in documents:
        yield from cut(io.StringIO(document, newline=""))


def read_file(path: Path, *, column: str | None, chat_template: ChatTemplate | None, cut: Cut) -> Iterator[str]:
    """The documents of one file, lazily.

    Args:
        path: an existing file with one of ``SUFFIXES``.
        column: the column of a table, not used for .txt; None: the only one that holds text.
        chat_template: for chats; None: chats are an error.
        cut: what is read of each document.
    Raises:
        CalibrationError: while reading: unreadable, malformed, not UTF-8, no such column, a chat that the
            template refuses.
    """
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return _read_text(path, cut)
    if suffix == ".parquet":
        return cut_each(_read_parquet(path, column, chat_template), cut)
    records = _json_lines(path) if suffix == ".jsonl" else _json_records(path)
    return cut_each(documents_of(records, str(path), column=column, chat_template=chat_template), cut)


def documents_of(
    records: Iterable[Record], source: str, *, column: str | None, chat_template: ChatTemplate | None
) -> Iterator[str]:
    """The text of one column of each record; a null is an empty document.

    Raises:
        CalibrationError: while reading: a record that is no object, no such column, no single text column.
    """
    records = iter(records)
    head = list(islice(records, GUESS_RECORDS))
    name = column if column is not None else _guess_column(source, [value for _, value in head])
    for where, record in chain(head, records):
        if not isinstance(record, dict):
            what = f"a record is a JSON object, not {type(record).__name__}"
            raise CalibrationError(message(where, what, 'write {"text": "..."}'))
        if name not in record:
            raise _no_such_column(where, name, list(record))
        yield _document(record[name], f"{where}, column '{name}'", chat_template)


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file, its line ends untouched; what goes wrong while it is read is a CalibrationError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        what = f"byte {_invalid_byte(path)} is not valid UTF-8"
        raise CalibrationError(message(str(path), what, "convert the file to UTF-8")) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CalibrationError:
    return CalibrationError(message(str(path), f"cannot be read ({error})", "give a readable, undamaged file"))


def _invalid_byte(path: Path) -> int:
    """The offset of the first invalid byte; the decoder's own counts from the block that it was given."""
    position, pending = 0, b""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            block = pending + block
            try:
                block.decode()
                valid = len(block)
            except UnicodeDecodeError as error:
                if error.reason != "unexpected end of data":
                    return position + error.start
                valid = error.start  # a character on the edge of the block: the next one may complete it
            position, pending = position + valid, block[valid:]
    return position


def _read_text(path: Path, cut: Cut) -> Iterator[str]:
    with _open_text(path) as file:
        yield from cut(file)


def _json_lines(path: Path) -> Iterator[Record]:
    with _open_text(path) as file:
        lines = iter(lambda: file.readline(MAX_JSON_CHARACTERS + 1), "")
        for number, line in enumerate(lines, 1):
            if line.strip():
                # Without its line end, which would move an error at the end to the next line.
                yield f"{path}, line {number}", _parse_json(line.rstrip(), path, number)


def _json_records(path: Path) -> Iterator[Record]:
    with _open_text(path) as file:
        while (first := file.read(1)).isspace():
            pass
        if first == "[":
            file.seek(0)
            records = _parse_json(file.read(MAX_JSON_CHARACTERS + 1), path, 1)
            assert isinstance(records, list)  # it begins with a bracket
            yield from ((f"{path}, record {number}", record) for number, record in enumerate(records, 1))
        else:
            yield from _json_lines(path)


def _parse_json(text: str, path: Path, first_line: int) -> object:
    """One JSON value; ``first_line`` is the line of the file that the text begins at."""
    fix = "give one object a line, or in a .json file an array of objects"
    if len(text) > MAX_JSON_CHARACTERS:
        what = f"a JSON value of more than {MAX_JSON_CHARACTERS} characters"
        raise CalibrationError(message(f"{path}, line {first_line}", what, "write a .jsonl file"))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {first_line + error.lineno - 1}"
        what = f"malformed JSON at column {error.colno} ({error.msg})"
        raise CalibrationError(message(where, what, fix)) from error
    except RecursionError as error:
        raise CalibrationError(message(f"{path}, line {first_line}", "JSON nested too deeply", fix)) from error


def _read_parquet(path: Path, column: str | None, chat_template: ChatTemplate | None) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            texts = [field.name for field in schema if _holds_text(field.type)]
            name = _choose_column(str(path), column, texts, list(schema.names))
            rows = _parquet_rows(file, path, name)
            yield from documents_of(rows, str(path), column=name, chat_template=chat_template)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _parquet_rows(file: Any, path: Path, column: str) -> Iterator[Record]:
    batches = file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[column])
    rows = chain.from_iterable(batch.to_pylist() for batch in batches)
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def _holds_text(arrow_type: Any) -> bool:
    """Whether an Arrow type is a string, or a list of structs with a role and a content."""
    from pyarrow import types

    if types.is_dictionary(arrow_type):
        return _holds_text(arrow_type.value_type)
    if types.is_list(arrow_type) or types.is_large_list(arrow_type):
        item = arrow_type.value_type
        return types.is_struct(item) and {"role", "content"} <= {field.name for field in item}
    is_string = types.is_string(arrow_type) or types.is_large_string(arrow_type)
    return bool(is_string or types.is_string_view(arrow_type))


def _guess_column(source: str, records: list[object]) -> str:
    tables = [record for record in records if isinstance(record, dict)]
    columns = list(dict.fromkeys(chain.from_iterable(tables)))
    # A column of nulls counts as text: there may be some further on, and the guess would have been wrong.
    texts = [name for name in columns if all(_may_be_text(record.get(name)) for record in tables)]
    # With no column at all there is nothing to guess; the first record, if any, is refused where it stands.
    return _choose_column(source, None, texts, columns) if columns else ""


def _may_be_text(value: object) -> bool:
    return value is None or isinstance(value, str) or _is_chat(value)


def _is_chat(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value)
    )


def _choose_column(source: str, column: str | None, texts: list[str], columns: list[str]) -> str:
    if column is not None:
        if column not in columns:
            raise _no_such_column(source, column, columns)
        return column
    if len(texts) == 1:
        return texts[0]
    if not texts:
        what = f"none of its columns ({', '.join(columns)}) holds text"
        raise CalibrationError(message(source, what, f"give strings, or chats as {_CHAT_EXAMPLE}"))
    what = f"{len(texts)} of its columns hold text: {', '.join(texts)}"
    raise CalibrationError(message(source, what, "name one after the source, as in data.jsonl:text"))


def _no_such_column(where: str, column: str, columns: list[str]) -> CalibrationError:
    return CalibrationError(message(where, f"no column '{column}'", f"name one of: {', '.join(columns)}"))


def _document(value: object, where: str, chat_template: ChatTemplate | None) -> str:
    if value is None:
        return ""
    if _is_chat(value):
        text = _chat_text(value, where, chat_template)  # type: ignore[arg-type]  # _is_chat saw every turn
    elif isinstance(value, str):
        text = value
    else:
        what = f"{type(value).__name__} is not text"
        raise CalibrationError(message(where, what, f"give a string or a chat {_CHAT_EXAMPLE}"))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"half a surrogate pair at character {error.start}"
        raise CalibrationError(message(where, what, "repair the escape in the file")) from error
    return text


def _chat_text(turns: list[dict[str, str]], where: str, chat_template: ChatTemplate | None) -> str:
    if chat_template is None:
        fix = "give plain text, or a model whose tokenizer has one"
        raise CalibrationError(message(where, "holds chats, and there is no chat template", fix))
    if not all(isinstance(turn[key], str) for turn in turns for key in ("role", "content")):
        raise CalibrationError(message(where, "a role or a content is not a string", "give strings"))
    try:
        return chat_template(turns)
    except ValueError as error:
        fix = "give chats that the tokenizer's template allows"
        raise CalibrationError(message(where, f"the chat template refuses it ({error})", fix)) from error
