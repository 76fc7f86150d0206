"""JSON objects from strangers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quantkit.errors import CheckpointError
from quantkit.strict_json import parse_object, read_json


def test_an_object() -> None:
    assert parse_object("x", b'{"a": {"b": [1, Infinity]}, "c": null}') == {"a": {"b": [1, float("inf")]}, "c": None}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not readable JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"a": 1, "a": 1}', "the key 'a' stands twice"),
        (b'{"x": [{"bits": 4, "bits": 8}]}', "the key 'bits' stands twice"),
        (b'{"a": ' + b"[" * 100_000, "not readable JSON"),
        (b'{"a": "\xc3"}', "not readable JSON"),
    ],
)
def test_refused(data: bytes, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        parse_object("config.json", data)
    assert str(caught.value).startswith("config.json: ")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match=r"config\.json is missing; look for it"):
        read_json(path, missing="look for it")
    path.write_text('{"a": 1}')
    assert read_json(path, missing="") == {"a": 1}
    os.truncate(path, 2**27)
    with pytest.raises(CheckpointError, match="has 134217728 bytes; at most 67108864 are read"):
        read_json(path, missing="")
