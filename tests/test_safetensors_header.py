"""Headers that lie: each is refused by what is wrong with it, before anything is read or allocated by it."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantkit.errors import CheckpointError
from quantkit.safetensors_header import TensorInfo, read_header


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: Any = (2,), place: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": place}


def test_what_the_format_s_own_writer_wrote(tmp_path: Path) -> None:
    tensors = {"b": torch.zeros(3, 2, dtype=torch.int8), "a": torch.ones(()), "c": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert read_header(tmp_path / "x.safetensors") == {
        "a": TensorInfo("x.safetensors", torch.float32, ()),
        "b": TensorInfo("x.safetensors", torch.int8, (3, 2)),
        "c": TensorInfo("x.safetensors", torch.float32, (0, 4)),
    }


BROKEN: dict[str, tuple[object, bytes, str]] = {
    "overlapping": ({"a": entry(), "b": entry(place=(4, 12))}, bytes(12), "b overlaps a"),
    "the same bytes twice": ({"a": entry(), "b": entry()}, bytes(8), "b overlaps a"),
    "a gap": ({"a": entry(), "b": entry(place=(12, 20))}, bytes(20), "b leaves a gap behind a"),
    "a gap in front": ({"a": entry(place=(4, 12))}, bytes(12), "a leaves a gap behind the header"),
    "padded": ({"a": entry()}, bytes(9), "have 8 bytes and the file has room for 9"),
    "truncated": ({"a": entry()}, bytes(7), "have 8 bytes and the file has room for 7"),
    "too few bytes for the shape": ({"a": entry((3,))}, bytes(8), "has 12 bytes and is said to lie in"),
    "backwards": ({"a": entry(place=(8, 0))}, bytes(8), "data_offsets"),
    "one offset": ({"a": entry(place=(8,))}, bytes(8), "data_offsets"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "data_offsets are None"),
    "offsets of other types": ({"a": entry(place=(0.0, 8.0))}, bytes(8), "data_offsets"),
    "a negative size": ({"a": entry((-2,))}, bytes(8), "shape"),
    "a true size": ({"a": entry((True, 2))}, bytes(8), "shape"),
    "a shape beyond 64 bits": ({"a": entry((0, 2**62, 2**62), (0, 0))}, b"", "shape"),
    "many dimensions": ({"a": entry((1,) * 1000 + (2,))}, bytes(8), "shape"),
    "no shape": ({"a": entry("2")}, bytes(8), "shape"),
    "a dtype of another kind": ({"a": entry(dtype="F8_E4M3")}, bytes(8), "dtype 'F8_E4M3' is not read"),
    "a dtype that is a list": ({"a": entry(dtype=[])}, bytes(8), "is not read"),
    "no entry": ({"a": 3}, b"", "not described"),
    "no name": ({"": entry()}, bytes(8), "name"),
    "a name that moves the cursor": ({"a\x1b[2J": entry()}, bytes(8), r"a\\x1b"),
    "a long name": ({"a" * 5000: entry()}, bytes(8), "name"),
    "metadata of another kind": ({"__metadata__": [], "a": entry()}, bytes(8), "__metadata__"),
    "metadata of numbers": ({"__metadata__": {"format": 1}, "a": entry()}, bytes(8), "__metadata__"),
    "a tensor twice": (b'{"a": {"dtype": "F32"}, "a": {"dtype": "F16"}}', b"", "'a' stands twice"),
    "a shape twice": (b'{"a": {"shape": [1], "shape": [2]}}', b"", "'shape' stands twice"),
    "nested deeply": (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, b"", "not readable JSON"),
    "a list": ([], b"", "not a JSON object"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not readable JSON"),
    "a number of many digits": (b'{"a": {"shape": [' + b"9" * 10_000 + b"]}}", b"", "not"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(case: str, tmp_path: Path) -> None:
    header, data, said = BROKEN[case]
    with pytest.raises(CheckpointError, match=said) as caught:
        read_header(write(tmp_path / "model.safetensors", header, data))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("length", [1, 100, 2**32, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_not_allocated(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "model.safetensors", b"", length=length)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=f"its header is said to have {length}"):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_header_of_many_megabytes_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", b"", length=2**30)
    os.truncate(path, 2**30 + 8)  # a hole: no disk, but a size
    with pytest.raises(CheckpointError, match="at most 33554432 are read"):
        read_header(path)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """A pipe would be waited on for ever."""
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is missing"):
        read_header(tmp_path / "model.safetensors")
