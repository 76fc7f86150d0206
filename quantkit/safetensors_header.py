"""The header of a safetensors file from a stranger, checked against the file before anything is read by it.

    8 bytes      length n of the header, little-endian
    n bytes      JSON: name -> {"dtype": …, "shape": [...], "data_offsets": [start, stop]}, and "__metadata__"
    the rest     the tensors, end to end: no byte is in two of them or in none

The format's own library checks most of this as well; here it is known, bounded and said in words before that library
maps the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import torch

from quantkit.errors import CheckpointError, UnreadFormatError, message
from quantkit.strict_json import parse_object

_LENGTH_BYTES = 8
_MAX_HEADER = 32 * 2**20  # 200 000 tensors with long names
_MAX_NAME = 1024
_MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 2**48
_METADATA = "__metadata__"

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
INTEGERS_ONLY = "quantkit reads integer codes (GPTQ, AWQ, compressed-tensors): give such a model, or the 16-bit one"
# Floating-point numbers of 8 bits or less, and their scales: FP8, NVFP4, MXFP4 and the like.
_NARROW = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a safetensors header says of a tensor."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.numel * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Name -> TensorInfo of one safetensors file.

    Raises:
        CheckpointError: missing, truncated, padded; tensors that overlap, leave gaps or do not fill their bytes; a name
            or a shape that no model has; a dtype that is not read.
    """
    try:
        if not path.is_file():
            raise CheckpointError(message(str(path), "is missing", "re-download the model"))
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            length = int.from_bytes(handle.read(_LENGTH_BYTES), "little")
            _check_length(path, length, size)
            data = handle.read(length)
    except OSError as error:
        raise CheckpointError(message(str(path), f"cannot be read ({error})", "check its permissions")) from error
    header = parse_object(f"{path}, its header", data)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, f"{_METADATA} is not an object of texts")
    found: dict[str, TensorInfo] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        found[name], place = _entry(path, name, entry)
        places.append((*place, name))
    _check_places(path, sorted(places), size - _LENGTH_BYTES - length)
    return found


def _check_length(path: Path, length: int, size: int) -> None:
    if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
        raise _broken(path, f"it has {size} bytes and its header is said to have {length}")
    if length > _MAX_HEADER:
        raise _broken(path, f"its header has {length} bytes; at most {_MAX_HEADER} are read")


def _entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    """A tensor and its place in the data."""
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise _broken(path, f"a tensor's name is {name[:80]!a}{'…' if len(name) > 80 else ''}")
    where = f"{path}, {name}"
    if not isinstance(entry, Mapping):
        raise _broken(where, "it is not described by an object")
    shape, place = entry.get("shape"), entry.get("data_offsets")
    if not _integers(shape, _MAX_DIMENSIONS) or prod(max(size, 1) for size in shape) > _MAX_ELEMENTS:
        raise _broken(where, f"its shape is {_short(shape)}")
    if not _integers(place, 2) or len(place) != 2 or place[0] > place[1]:
        raise _broken(where, f"its data_offsets are {_short(place)}")
    stated = entry.get("dtype")
    if isinstance(stated, str) and stated in _NARROW:
        raise UnreadFormatError(message(where, f"dtype {stated!r} is not read", INTEGERS_ONLY))
    dtype = _DTYPES.get(stated) if isinstance(stated, str) else None
    if dtype is None:
        raise CheckpointError(
            message(where, f"dtype {_short(stated)} is not read", f"convert it to one of {', '.join(_DTYPES)}")
        )
    info = TensorInfo(path.name, dtype, tuple(shape))
    if info.nbytes != place[1] - place[0]:
        raise _broken(where, f"{dtype} {list(shape)} has {info.nbytes} bytes and is said to lie in {place}")
    return info, (place[0], place[1])


def _check_places(path: Path, places: list[tuple[int, int, str]], size: int) -> None:
    """The tensors lie end to end, from the first byte of the data to the last."""
    end, before = 0, "the header"
    for start, stop, name in places:
        if start != end:
            raise _broken(path, f"{name} {'overlaps' if start < end else 'leaves a gap behind'} {before}")
        end, before = stop, name
    if end != size:
        raise _broken(path, f"its tensors have {end} bytes and the file has room for {size}")


def _integers(value: Any, most: int) -> TypeGuard[list[int]]:
    """Whether it is a list of at most so many integers, none of them negative."""
    return isinstance(value, list) and len(value) <= most and all(type(one) is int and one >= 0 for one in value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _broken(where: Path | str, what: str) -> CheckpointError:
    return CheckpointError(message(str(where), f"is not a whole safetensors file: {what}", "re-download or repair it"))
