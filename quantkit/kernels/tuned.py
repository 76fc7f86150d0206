"""Tiles that were measured on the user's GPU, kept in a cache file: what `quantkit tune` writes and products look up.

The file is JSON: GPU name -> list of choices. It is the user's own, but a wrong one would give wrong kernels, so it is
read strictly.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from quantkit.errors import KernelError, message
from quantkit.kernels.tiles import Tile

_ROWS, _STAGES, _WARPS = (32, 64), range(1, 9), (1, 2, 4, 8)
_MOST_SPLITS = 256


@dataclass(frozen=True, slots=True)
class Product:
    """What a choice is for.

    Attributes:
        out_features, in_features: of the weight.
        bits, group, symmetric: of its packed form.
        dtype: of x, such as float16.
        tokens: rows of x of a program: 8, 16 or 32.
    """

    out_features: int
    in_features: int
    bits: int
    group: int
    symmetric: bool
    dtype: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Choice:
    """The tile and the splits of K that were fastest for a product, and seconds: theirs and the static choice's."""

    product: Product
    tile: Tile
    splits: int
    seconds: float
    static_seconds: float


def cache_path() -> Path:
    """Of the file: under XDG_CACHE_HOME, or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "quantkit" / "triton_tiles.json"


def save(gpu: str, choices: Iterable[Choice], path: Path) -> None:
    """Put choices for a GPU into the file; others in it stay. Atomic.

    Raises:
        KernelError: what stands there is no such file.
    """
    known = dict(read(path))
    merged = {**known.get(gpu, {}), **{choice.product: choice for choice in choices}}
    known[gpu] = merged
    text = json.dumps({name: [asdict(choice) for choice in of.values()] for name, of in known.items()}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(text + "\n", encoding="utf-8")
    new.replace(path)


def read(path: Path) -> Mapping[str, Mapping[Product, Choice]]:
    """GPU name -> product -> choice; empty when there is no file.

    Raises:
        KernelError: not such a file, or a tile that no kernel has.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {gpu: {choice.product: choice for choice in map(_choice, listed)} for gpu, listed in found.items()}
    except (OSError, UnicodeDecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"it does not hold tuned tiles ({type(error).__name__}: {error})"
        raise KernelError(message(str(path), what, "delete it, then run quantkit tune again")) from error


def _choice(found: Mapping[str, object]) -> Choice:
    """One entry of the file.

    Raises:
        ValueError, TypeError, KeyError: anything else than what :func:`save` writes.
    """
    product, tile = Product(**_typed(Product, found["product"])), Tile(**_typed(Tile, found["tile"]))
    rest = {name: found[name] for name in ("splits", "seconds", "static_seconds")}
    if set(found) != {"product", "tile", *rest} or not isinstance(rest["splits"], int):
        raise ValueError(f"fields {sorted(found)}")
    columns_fit = tile.tile_k in (32, 64, 128) and tile.tiles in (1, 2, 4) and tile.columns in (64, 128)
    group_fits = tile.tile_k * tile.repeat == max(product.group, tile.tile_k)
    if not (columns_fit and group_fits and tile.rows in _ROWS and tile.tokens == product.tokens):
        raise ValueError(f"tile {astuple(tile)}")
    if not (tile.stages in _STAGES and tile.warps in _WARPS and 1 <= rest["splits"] <= _MOST_SPLITS):
        raise ValueError(f"tile {astuple(tile)} with {rest['splits']} splits")
    return Choice(product, tile, rest["splits"], float(str(rest["seconds"])), float(str(rest["static_seconds"])))


def _typed(kind: type[Product] | type[Tile], found: object) -> dict[str, Any]:
    """The fields of a dataclass of int, bool and str, by those very types."""
    if not isinstance(found, dict) or set(found) != {field.name for field in fields(kind)}:
        raise ValueError(f"not a {kind.__name__}: {found}")
    types = {"int": int, "bool": bool, "str": str}
    for field in fields(kind):
        if type(found[field.name]) is not types[str(field.type)]:
            raise TypeError(f"{field.name} is {found[field.name]!r}")
    return found


def lookup(gpu: str, product: Product) -> Choice | None:
    """What was measured for a product on a GPU; None where nothing was. The file is read once a process."""
    return _loaded(cache_path()).get(gpu, {}).get(product)


@cache
def _loaded(path: Path) -> Mapping[str, Mapping[Product, Choice]]:
    return read(path)
