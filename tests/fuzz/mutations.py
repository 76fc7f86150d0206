"""Model directories that are almost right: valid ones with a few things in them changed where readers look.

A directory is a mapping of file names to bytes. JSON is changed as a tree (a value replaced, removed, taken from
elsewhere, a key said twice), a safetensors file by its header, by its
length and by single bytes.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st


class Files(dict[str, bytes]):
    """The files of a directory; shown by their sizes."""

    def __repr__(self) -> str:
        return f"Files({', '.join(f'{name}: {len(data)} bytes' for name, data in self.items())})"


class Tree:
    """A JSON value that is not shown."""

    def __init__(self, value: Any) -> None:
        self.value = value


ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    5,
    8,
    32,
    33,
    2**31,
    2**63,
    10**30,
    0.5,
    float("inf"),
    float("nan"),
    "",
    "Linear",
    "int",
    "../x",
    "/etc/passwd",
    "a\x00b",
    "\x1b[2J",
    "x" * 3000,
    "re:",
    "re:(a|a)*b",
    "re:(?R)",
    "re:.*",
    "gptq",
    "mixtral",
    "gpt2",
    "float16",
    [],
    ["lm_head"],
    ["re:.*(.*)*$"],
    [[[[]]]],
    [1, 2],
    {},
    {"": {}},
    {"group_0": {}},
)
_SAME = "__same_key__"


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value below the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _paths(value, (*path, key))


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@st.composite
def changed_tree(draw: st.DrawFn, original: Tree) -> bytes:
    """A JSON value with one to three changes, as text."""
    tree = copy.deepcopy(original.value)
    twice = False
    for _ in range(draw(st.integers(1, 3))):
        paths = list(_paths(tree))
        if not paths:
            break
        path = draw(st.sampled_from(paths))
        owner, key = _at(tree, path[:-1]), path[-1]
        change = draw(st.sampled_from(("odd", "odd", "odd", "near", "remove", "move", "add", "twice")))
        if change == "remove":
            del owner[key]
        elif change == "move":
            owner[key] = copy.deepcopy(_at(tree, draw(st.sampled_from(paths))))
        elif change == "near" and type(owner[key]) is int:
            owner[key] = draw(st.sampled_from((owner[key] + 1, owner[key] - 1, owner[key] * 2, -owner[key])))
        elif change in ("add", "twice") and isinstance(owner, dict):
            twice = twice or change == "twice"
            owner[draw(st.sampled_from(("x", "__metadata__", "weight"))) if change == "add" else _SAME] = owner[key]
        else:
            owner[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    text = json.dumps(tree)
    return (text.replace(_SAME, draw(st.sampled_from(("shape", "model_type", "bits")))) if twice else text).encode()


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@st.composite
def changed_safetensors(draw: st.DrawFn, files: Files, name: str) -> bytes:
    """A safetensors file with a changed header, length or content."""
    data = files[name]
    header, body = _parts(data)
    change = draw(st.sampled_from(("header", "header", "header", "length", "cut", "grow", "byte", "ones", "swap")))
    text = json.dumps(header).encode()
    length = len(text)
    if change == "header":
        text = draw(changed_tree(Tree(header)))
        length = len(text)
    elif change == "length":
        length = draw(st.sampled_from((0, 1, length - 1, length + 1, length + len(body), 2**31, 2**63, 2**64 - 1)))
    elif change == "cut":
        body = body[: draw(st.integers(0, len(body)))]
    elif change == "grow":
        body += bytes(draw(st.integers(1, 64)))
    elif change == "byte":
        whole = bytearray(data)
        whole[draw(st.integers(0, len(whole) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(whole)
    elif change == "ones":  # NaN, or the largest codes
        spoiled, at = bytearray(body), draw(st.integers(0, max(len(body) - 16, 0)))
        spoiled[at : at + 16] = draw(st.sampled_from((b"\xff", b"\x00"))) * len(spoiled[at : at + 16])
        body = bytes(spoiled)
    else:  # two tensors of each other's names
        names = [name for name in header if name != "__metadata__"]
        one, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
        header[one], header[other] = header[other], header[one]
        text = json.dumps(header).encode()
        length = len(text)
    return struct.pack("<Q", length) + text + body


@st.composite
def changed_files(draw: st.DrawFn, files: Files) -> Files:
    """A directory with one file of it changed or missing, or two."""
    found = Files(files)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(found)))
        if name.endswith(".safetensors"):
            try:
                found[name] = draw(changed_safetensors(found, name))
            except (ValueError, struct.error):  # changed before, to what has no header
                continue
        elif draw(st.integers(0, 19)) == 0:
            del found[name]
        else:
            try:
                found[name] = draw(changed_tree(Tree(json.loads(found[name]))))
            except ValueError:
                continue
        if not found:
            break
    return found
