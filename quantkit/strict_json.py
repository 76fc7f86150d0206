"""JSON from strangers: one object, of bounded size and depth, in which no key is said twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError, message

_MAX_BYTES = 64 * 2**20  # an index of half a million tensors; parsed, the worst of so many bytes take 2 GB


def parse_object(where: str, data: bytes) -> dict[str, Any]:
    """The JSON object that these bytes are.

    Args:
        where: the file, for error messages.
        data: UTF-8.

    Raises:
        CheckpointError: not JSON, nested too deeply, a key that an object holds twice, or not an object.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(message(where, f"is not readable JSON ({error})", "repair or re-download it")) from error
    if not isinstance(value, dict):
        raise CheckpointError(message(where, "is not a JSON object", "repair or re-download it"))
    return value


def read_json(path: Path, *, missing: str) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MiB.

    Args:
        path: the file.
        missing: what to tell the user to do when it is not there.

    Raises:
        CheckpointError: not there, too large, or not a JSON object; see :func:`parse_object`.
    """
    try:
        if not path.is_file():
            raise CheckpointError(message(str(path.parent), f"{path.name} is missing", missing))
        with path.open("rb") as handle:
            data = handle.read(_MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(message(str(path), f"cannot be read ({error})", "check its permissions")) from error
    if len(data) > _MAX_BYTES:
        raise CheckpointError(message(str(path), f"has {path.stat().st_size} bytes", f"at most {_MAX_BYTES} are read"))
    return parse_object(str(path), data)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ: of two readers, one may take the first of two equal keys and one the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice in one object")
    return found
